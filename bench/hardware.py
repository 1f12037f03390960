"""What the machine itself can do, as tasks of runners.py."""

from statistics import median

import torch

from inkling.dry_run import seconds_of
from inkling.report import peak_flops


def matmul(spec: dict) -> dict:
    """Operations a second of a large matrix product in spec["dtype"]: the median of nine."""
    device = spec["device"]
    size = spec["size"]
    a = torch.randn(size, size, device=device).to(getattr(torch, spec["dtype"]))
    seconds = [seconds_of(device, torch.matmul, a, a) for _ in range(11)]
    return {"rate": 2 * size ** 3 / median(seconds[2:])}


def card(spec: dict) -> dict:
    """The card's name, and its peak rate if it is known (0 otherwise)."""
    return {"name": torch.cuda.get_device_name(spec["device"]), "peak": peak_flops(spec["device"], "bfloat16")}
