"""Two operations that a CPU does several times faster in another way than PyTorch's; elsewhere they are PyTorch's."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def dropout(x, p: float):
    """Zero each element with probability p (on a CPU in steps of 1/256) and scale the others up.

    A CPU draws F.dropout's numbers one by one; eight to a 64-bit integer are about 3 times faster there."""
    zeroed = round(256 * p)
    if zeroed == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    numbers = torch.randint(-2**63, 2**63 - 1, (x.numel() // 8 + 1,), dtype=torch.int64).view(torch.uint8)
    return x * (numbers[:x.numel()].view(x.shape) >= zeroed) * (256 / (256 - zeroed))


class Linear(nn.Linear):
    """nn.Linear, but up to 16 rows without gradient in float32 go as columns through the matrix taken as a batch of
    four: that reads it at the memory's pace, where BLAS's usual way may reach a third of it (bench/generate.py)."""

    def forward(self, x):
        rows = x.numel() // self.in_features
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") \
                or torch.is_grad_enabled() or rows > 16 or self.out_features % 4:
            return super().forward(x)
        columns = x.reshape(rows, -1).mT.expand(4, -1, -1)                      # (4, in_features, rows)
        y = torch.bmm(self.weight.view(4, -1, self.in_features), columns).view(-1, rows).mT
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], -1)
