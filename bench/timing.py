"""A timer of steps and an evaluation, the same for every way of training.

The evaluation reads the whole val split in windows that follow on one another, in float32 (TF32 on
a card), without dropout. The timer stands still meanwhile.
"""

import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from inkling.clock import Stopwatch
from inkling.dataset import open_data
from inkling.device import synchronize
from inkling.dry_run import seconds_of
from inkling.report import peak_memory


class StepTimer:
    """Times a training run on `device`, in a process that was launched at `launched` (time.time()).

    startup: seconds from the launch to the first step. step_ends: seconds of training at the end of
    each step. curve: (step, seconds of training, loss) at each evaluation.
    """

    def __init__(self, device: str, launched: float):
        self.device = device
        self.launched = launched
        self.stopwatch = Stopwatch(device)
        self.startup = 0.0
        self.step_ends = []
        self.curve = []

    def start(self):
        """The first step begins."""
        synchronize(self.device)
        self.startup = time.time() - self.launched
        self.stopwatch.start()

    def end_step(self):
        if not self.step_ends:
            synchronize(self.device)    # for the time from the launch to the first step's end
        self.step_ends.append(self.stopwatch.seconds())

    def evaluate(self, step: int, evaluate):
        """Add the loss that evaluate() returns to the curve; the time this takes does not count."""
        with self.stopwatch.paused():
            seconds = self.stopwatch.seconds()
            self.curve.append((step, seconds, evaluate()))

    def figures(self, compiled: bool, **more) -> dict:
        """The figures of the run, after its last step. What the first step of compiled code takes
        beyond a median step is compilation, and counts as start-up."""
        synchronize(self.device)
        end = self.stopwatch.seconds()
        first_step = self.step_ends[0]
        steps = np.diff(self.step_ends).tolist()
        step_seconds = median(steps) if steps else first_step
        compiling = max(0.0, first_step - step_seconds) if compiled else 0.0
        curve = self.curve or [(len(self.step_ends), end, None)]
        return {
            "curve": [(step, max(0.0, seconds - compiling), loss) for step, seconds, loss in curve],
            "steps": len(self.step_ends),
            "step_seconds": step_seconds,
            "mean_seconds": (end - first_step) / max(1, len(steps)),
            "startup": self.startup + compiling,
            "first_step": self.startup + first_step,            # from the launch to its end
            "peak": peak_memory(self.device),
            **more,
        }


def open_set(spec: dict) -> tuple:
    """({"train": ids, "val": ids}, meta) of the set in the folder spec["data"]."""
    return open_data(Path(spec["data"]), spec["block_size"])


@torch.no_grad()
def full_loss(model, logits_of, ids, block_size: int, device: str) -> float:
    """Mean loss of the model in nats over every whole window of `ids`.
    logits_of(x, y): logits (B, T, vocab_size)."""
    model.eval()
    windows = (len(ids) - 1) // block_size
    total = 0.0
    for first in range(0, windows, 16):
        starts = np.arange(first, min(windows, first + 16)) * block_size
        batch = ids[starts[:, None] + np.arange(block_size + 1)]
        batch = torch.from_numpy(batch.astype(np.int64)).to(device)
        x = batch[:, :-1].contiguous()
        y = batch[:, 1:].contiguous()
        logits = logits_of(x, y).float()
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    return total / (windows * block_size)


def count_parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def time_parts(parts: dict, steps: int, device: str) -> dict:
    """Median seconds of each of `parts` of a step, {name: function(number of the step)}, over
    `steps` steps, after two that warm up."""
    seconds = {name: [] for name in parts}
    for number in range(steps + 2):
        for name, part in parts.items():
            seconds[name].append(seconds_of(device, part, number))
    return {name: median(times[2:]) for name, times in seconds.items()}
