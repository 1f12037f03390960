"""Signals, the deadline, and numbers that are not finite."""

import contextlib
import os
import signal
import time
from pathlib import Path

import torch

from inkling.checkpoint import OPEN
from inkling.cli import UserError
from inkling.device import synchronize
from inkling.distributed import Ranks


class Deadline:
    """The end of a run's `minutes` on the clock (0: never), and the number of steps that fit before it."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.first = None               # (step, seconds of training) after the steps that warm up

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def steps(self, step: int, report, eval_interval: int) -> int:
        """The steps of the whole run, from the pace of ten of them (or fewer, if these take a twentieth of the time)
        and of the evaluations so far; OPEN before. A thirtieth of the time is kept back."""
        synchronize(report.device)
        seconds = report.seconds()
        if step < 3:
            return OPEN
        if self.first is None:
            self.first = step, seconds
        done, took = step - self.first[0], seconds - self.first[1]
        if not done or (done < 10 and took < self.left() / 20):
            return OPEN
        each, pause = took / done, report.pause()
        count = step + max(1, int((self.left() * 29 / 30 - pause) / (each + pause / eval_interval)))
        report.say(f"time     for {count:,} steps of {1000 * each:.0f} ms: max_iters={count}")
        return count


@contextlib.contextmanager
def explain_failures(out_dir: Path):
    """Turn what can go wrong with a machine in a run into one line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
            raise UserError("out of memory: halve batch_size and double gradient_accumulation_steps (the same training), or lower "
                 f"block_size; what {out_dir} holds stays, and --init_from=resume goes on from it "
                 f"({text.strip().splitlines()[0][:120] if text else 'MemoryError'})")
        if not isinstance(error, torch.distributed.DistError) and "Connection " not in text:
            raise
        raise UserError(f"another process of this run has gone: {out_dir}/last.pt holds the last save, --init_from=resume goes on "
             f"({text.strip().splitlines()[0][:120]})", code=1)


class Stop:
    """SIGINT and SIGTERM ask for a stop after the step in progress; a second SIGINT stops at once. So does the end of
    the time that was given."""

    def __init__(self, deadline: Deadline):
        self.deadline, self.signal, self.over = deadline, 0, False
        self.before = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):       # not the main thread, when used as a library
                self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, _frame):
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os._exit(130)               # what is on the disk is whole at every moment
        self.signal = number

    def reasons(self) -> list:
        """Whether this process has run out of time, got SIGINT, got SIGTERM."""
        return [self.over or self.deadline.left() < 0, self.signal == signal.SIGINT, self.signal == signal.SIGTERM]

    def agree(self, counts: list):
        """Take over what any of the processes has, so that all leave in the same way; counts: of their `reasons`."""
        over, interrupted, terminated = counts
        self.over = over > 0
        self.signal = self.signal or (signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0)

    @property
    def asked(self) -> bool:
        return any(self.reasons())

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + self.signal


class Guard:
    """Notices a loss or gradient that is not finite, and requests to stop, before an update is made; every rank sees
    the same at the same step. On a GPU the verdict stays there, as `found_inf`, which turns this update and all later
    ones into no-ops, and the host reads it only when asked to: reading it would hold up the next step."""

    def __init__(self, ranks: Ranks, stop: Stop, optimizers: list, scaler, device: str, dtype: str):
        self.ranks, self.stop, self.optimizers, self.scaler = ranks, stop, optimizers, scaler
        self.scaled = dtype == "float16"        # its gradients may overflow; the GradScaler skips those steps
        self.immediate = self.scaled or torch.device(device).type != "cuda"     # only fused AdamW knows found_inf
        self.bad = torch.zeros((), device=device)

    def check(self, loss, norm, look: bool) -> tuple:
        """(not finite, asked to stop), as far as the host knows. look: read the device's verdict now."""
        # A scale below 1 means that halving it did not help: no overflow, then.
        overflow = self.scaled and self.scaler.get_scale() >= 1
        finite = torch.isfinite(loss) & (torch.isfinite(norm) | overflow)
        asked = [torch.full_like(self.bad, reason) for reason in self.stop.reasons()]
        flags = self.ranks.total(torch.stack((1 - finite.to(self.bad.dtype), *asked)))
        self.bad = torch.maximum(self.bad, flags[0].clamp(max=1))
        if not self.immediate:
            for optimizer in self.optimizers:
                optimizer.found_inf = self.bad
        if not (look or self.immediate):
            return False, False
        _, *counts = flags.tolist()
        self.stop.agree(counts)
        return self.bad.item() > 0, any(counts)
