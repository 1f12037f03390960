"""Ranks of a run in several processes."""

import contextlib
import gc
import os
import warnings

import torch

from inkling.cli import UserError

# A norm's gain stays in float32 under autocast; and a block returns its values, a view, which nothing changes in place.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
# The newer name of that argument of DistributedDataParallel is unknown to PyTorch 2.11.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)


class Ranks:
    """This process's place among those that torchrun started; one of one otherwise."""

    def __init__(self):
        try:
            self.rank, self.world, self.local = (int(os.environ.get(name, default)) for name, default in
                                                 (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        except ValueError as error:
            raise UserError(f"RANK, WORLD_SIZE or LOCAL_RANK is set to something that torchrun never sets: {error}")
        self.first = self.rank == 0

    def join(self, backend: str, device: str) -> str:
        """Meet the other processes; returns the device of this one."""
        if self.world == 1:
            return device
        if torch.device(device).type == "cuda":
            device = f"cuda:{self.local}"
            torch.cuda.set_device(device)
        if backend == "auto":
            backend = "nccl" if device.startswith("cuda") else "gloo"
        torch.distributed.init_process_group(backend)
        return device

    def tell(self, value):
        """Rank 0's `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, tensor):
        """The sum over ranks, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def share(self, count: int, batch_size: int) -> tuple:
        """(sequences, micro-batches): this process's equal share of the `count` sequences of a step, and the number
        of equal micro-batches of at most batch_size that it makes."""
        if count % self.world:
            raise UserError(f"batch_size * gradient_accumulation_steps = {count} must divide by the {self.world} processes")
        rows = count // self.world
        return rows, next(n for n in range(-(-rows // batch_size), rows + 1) if rows % n == 0)

    def copies(self, step_model, device: str):
        """The model for training: each process has a copy, and their gradients are averaged."""
        if self.world == 1:
            return step_model
        return torch.nn.parallel.DistributedDataParallel(           # whose buffers are constants
            step_model, [device] if device.startswith("cuda") else None, broadcast_buffers=False)

    def shard(self, model, device: str):
        """The model, of whose weights, gradients and optimizer state each process holds its share, and a block's
        weights as a whole only while it is at work (PyTorch's fully_shard; arXiv 2304.11277)."""
        if self.world == 1:
            return model.to(device)
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = torch.distributed.init_device_mesh(torch.device(device).type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "next_logits")      # generate's way in
        return model.to(device)         # what was not cut, such as buffers

    def adding_up(self, step_model, last: bool):
        """A context for one micro-batch: gradients are averaged over the processes once a step, in its last one."""
        if hasattr(step_model, "set_requires_gradient_sync"):
            step_model.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return step_model.no_sync()
        return contextlib.nullcontext()

    def whole(self, value):
        """Dicts and lists with every sharded tensor in them put together, for the first rank (None for the others); all
        ranks must ask."""
        if isinstance(value, dict):
            return {key: self.whole(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self.whole(part) for part in value]
        if not hasattr(value, "full_tensor"):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if self.first else None

    def spreading(self) -> dict:
        """How Muon shares its work: each process treats an equal part of the stacked matrices (n, rows, cols)."""
        if self.world == 1:
            return {}
        def spread(function, stacked):
            each = -(-len(stacked) // self.world)
            mine = torch.zeros(each, *stacked.shape[1:], dtype=stacked.dtype, device=stacked.device)
            part = stacked[self.rank * each:(self.rank + 1) * each]
            mine[:len(part)] = part
            every = torch.empty(each * self.world, *stacked.shape[1:], dtype=stacked.dtype, device=stacked.device)
            torch.distributed.all_gather(list(every.split(each)), function(mine))
            return every[:len(stacked)]
        return dict(spread=spread)

    def leave(self):
        if self.world > 1:
            gc.collect()
            torch.distributed.destroy_process_group()
