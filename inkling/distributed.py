"""The processes of a run. Methods are named after what they call in torch.distributed."""

import contextlib
import gc
import os
import warnings

import torch

from inkling.cli import UserError

# A norm's gain stays in float32 under autocast; and a block returns its values, a view, which
# nothing changes in place.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
# PyTorch 2.11 does not know the newer name of that argument of DistributedDataParallel.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)


class Ranks:
    """This process's rank among the processes that torchrun started; rank 0 of 1 without it."""

    def __init__(self):
        try:
            self.rank = int(os.environ.get("RANK", 0))
            self.world = int(os.environ.get("WORLD_SIZE", 1))
            self.local = int(os.environ.get("LOCAL_RANK", 0))
        except ValueError as error:
            raise UserError(f"RANK, WORLD_SIZE or LOCAL_RANK is set to a value that torchrun never sets: {error}")
        if self.world == 1:             # RANK alone makes no second process
            self.rank = 0
        self.first = self.rank == 0
        self.device = "cpu"

    def join(self, backend: str, device: str) -> str:
        """Join the process group, if there is one. Returns the device of this process."""
        self.device = device
        if self.world == 1:
            return device
        if torch.device(device).type == "cuda":
            self.device = f"cuda:{self.local}"
            torch.cuda.set_device(self.device)
        if backend == "auto":
            backend = "nccl" if self.device.startswith("cuda") else "gloo"
        torch.distributed.init_process_group(backend)
        return self.device

    def leave(self):
        """Leave the process group; whatever still refers to the wrapped model keeps its threads
        alive."""
        if self.world > 1:
            gc.collect()
            torch.distributed.destroy_process_group()

    def broadcast(self, value):
        """Rank 0's `value` (any object), on every rank."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def all_reduce(self, tensor):
        """The sum of `tensor` over the ranks, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def all_true(self, value: bool) -> bool:
        """Whether `value` is true on every rank."""
        return self.all_reduce(torch.tensor(float(value), device=self.device)).item() == self.world

    def share(self, sequences: int, batch_size: int) -> tuple:
        """(sequences, micro_batches): this rank's equal share of a step's sequences, and the number
        of equal micro-batches, of at most batch_size sequences, that it is computed in."""
        if sequences % self.world:
            raise UserError(f"batch_size * gradient_accumulation_steps = {sequences} must be divisible by the number "
                            f"of processes, {self.world}")
        share = sequences // self.world
        micro_batches = -(-share // batch_size)
        while share % micro_batches:
            micro_batches += 1
        return share, micro_batches

    def wrap_ddp(self, model):
        """The model for training: every rank has a copy, and their gradients are averaged."""
        if self.world == 1:
            return model
        device_ids = [self.device] if self.device.startswith("cuda") else None
        # Its buffers are constants.
        return torch.nn.parallel.DistributedDataParallel(model, device_ids, broadcast_buffers=False)

    def fully_shard(self, model):
        """Shard weights, gradients and optimizer state across the ranks: a block's weights are
        whole only while it computes (PyTorch's fully_shard; arXiv 2304.11277)."""
        if self.world > 1:
            # Imported here, since it takes half a second that other runs need not wait.
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = torch.distributed.init_device_mesh(torch.device(self.device).type, (self.world,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            register_fsdp_forward_method(model, "next_logits")      # how `generate` enters the model
        return model.to(self.device)    # what was not sharded, such as buffers

    def gather(self, value):
        """Dicts and lists with every sharded tensor in them made whole, on the CPU of rank 0 (None
        on the others). All ranks must call it."""
        if isinstance(value, dict):
            return {key: self.gather(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.gather(inner) for inner in value]
        if not is_sharded(value):
            return value
        whole = value.full_tensor()
        return whole.cpu() if self.first else None

    def map_stacked(self, function, stacked):
        """function(stacked) for a function that treats the matrices of stacked (n, rows, cols) one
        by one: every rank computes an equal part and receives the others'."""
        if self.world == 1:
            return function(stacked)
        size = -(-len(stacked) // self.world)
        begin = self.rank * size
        mine = torch.zeros(size, *stacked.shape[1:], dtype=stacked.dtype, device=stacked.device)
        part = stacked[begin:begin + size]
        mine[:len(part)] = part
        results = torch.empty(size * self.world, *stacked.shape[1:], dtype=stacked.dtype, device=stacked.device)
        torch.distributed.all_gather(list(results.split(size)), function(mine))
        return results[:len(stacked)]


def is_sharded(tensor) -> bool:
    """Whether this rank holds only its share of the tensor."""
    return hasattr(tensor, "full_tensor")


def gradient_sync(model, last: bool):
    """A context for one micro-batch, forward and backward: ranks average their gradients in a
    step's last one only."""
    if hasattr(model, "set_requires_gradient_sync"):        # fully_shard's
        model.set_requires_gradient_sync(last)
    elif hasattr(model, "no_sync") and not last:            # DistributedDataParallel's
        return model.no_sync()
    return contextlib.nullcontext()
