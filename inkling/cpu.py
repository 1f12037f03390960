"""Operations that a CPU does several times faster in another way than PyTorch's; elsewhere they are PyTorch's."""

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


def alone(x, rows: int) -> bool:
    """Whether x holds one token's features in compiled code without gradient on a CPU: a loop that the compiler writes
    over a matrix reads it at the memory's pace, in 16 bits too; the libraries' routines are made for many rows."""
    return (rows == 1 and x.device.type == "cpu" and torch.compiler.is_compiling() and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu"))


def in_blocks(q, keys, values, dropout_p: float = 0.0):
    """Causal attention of q, keys and values (B, n_head, T, head_dim), spelled out for blocks of queries, each with the
    keys that it may see: in 16 bits faster than PyTorch's flash path for CPUs, 1.3 times at (32, 2, 256, 128) forward
    and backward and 2.1 times at (48, 2, 64, 64), compiled 1.7 and 2.7 times (without AMX); in float32 it is not.
    With dropout, for which PyTorch leaves that path, 2 times in float32 and 3 in bfloat16 at (32, 6, 256, 64)."""
    T, parts = q.size(2), []
    q = q * q.size(3)**-0.5             # before the product, which might overflow float16
    size = max(64, T // 8)              # at most so many blocks, since each is compiled
    for first in range(0, T, size):
        last = min(T, first + size)
        scores = (q[:, :, first:last] @ keys[:, :, :last].mT).float()
        seen = torch.ones(last - first, last, dtype=torch.bool).tril(first)
        weights = dropout(scores.masked_fill(~seen, -torch.inf).softmax(-1).to(values.dtype), dropout_p)
        parts.append(weights @ values[:, :, :last])
    return torch.cat(parts, dim=2)


def attention(q, keys, values, mask, causal: bool, dropout_p: float):
    """F.scaled_dot_product_attention of q (B, n_head, T, head_dim) and keys and values (B, n_kv_head, S, head_dim);
    mask (T, S) or None. On a CPU it is spelled out in 16 bits, with dropout and for a single query of compiled code."""
    B, H, T, D = q.shape
    groups = keys.size(1)
    if causal and keys.size(2) == T and groups == H and q.device.type == "cpu" and \
            (dropout_p or torch.is_autocast_enabled("cpu")):
        return in_blocks(q, keys, values, dropout_p)
    if not alone(q, B * T) or mask is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal, dropout_p=dropout_p,
                                              enable_gqa=groups != H)
    scores = (q.view(groups, H // groups, 1, D).float() * keys[0, :, None].float()).sum(-1) * D**-0.5
    p = scores.masked_fill(~mask[0], -torch.inf).softmax(-1)                    # (groups, H // groups, S)
    return (p[..., None] * values[0, :, None].float()).sum(-2).to(q.dtype).view(B, H, T, D)


class Linear(nn.Linear):
    """nn.Linear, but up to 16 rows without gradient in float32 go as columns through the matrix taken as a batch of
    four: that reads it at the memory's pace, where BLAS's usual way may reach a third of it (bench/generate.py)."""

    def forward(self, x):
        rows, whole = x.numel() // self.in_features, self.out_features // 4 * 4
        if alone(x, rows):
            y = (self.weight.float() * x.reshape(1, -1).float()).sum(-1)
            return (y if self.bias is None else y + self.bias).to(x.dtype).view(*x.shape[:-1], -1)
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") \
                or torch.is_grad_enabled() or rows > 16 or not whole:
            return super().forward(x)
        columns = x.reshape(rows, -1).mT                                        # (in_features, rows)
        y = torch.bmm(self.weight[:whole].view(4, -1, self.in_features), columns.expand(4, -1, -1)).view(-1, rows)
        if whole < self.out_features:
            y = torch.cat((y, self.weight[whole:] @ columns))
        return (y.mT if self.bias is None else y.mT + self.bias).reshape(*x.shape[:-1], -1)
