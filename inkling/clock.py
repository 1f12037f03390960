"""The time of a run: a stopwatch that counts only training, and the deadline that --max_minutes
sets."""

import time
from contextlib import contextmanager

from inkling.device import synchronize


class Stopwatch:
    """Seconds of training. It stands still while evaluation, sampling and saving are `paused()`.

    seconds_before: what earlier processes of a resumed run have counted.
    """

    def __init__(self, device: str, seconds_before: float = 0.0):
        self.device = device
        self.counted = seconds_before
        self.running_since: float | None = None
        self.paused_seconds = 0.0
        self.evaluations = 0            # by this process

    def start(self):
        self.running_since = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of training so far."""
        if self.running_since is None:
            return self.counted
        return self.counted + time.perf_counter() - self.running_since

    @contextmanager
    def paused(self):
        """Stand still in this block, once the device has done what it was asked to do."""
        synchronize(self.device)
        self.counted = self.seconds()
        self.running_since = None
        began = time.perf_counter()
        try:
            yield
        finally:
            self.start()
            self.paused_seconds += self.running_since - began

    def pause_seconds(self) -> float:
        """Seconds that an evaluation takes, with its saves and its sample: the mean so far, 0
        before the first."""
        return self.paused_seconds / max(1, self.evaluations)


class Deadline:
    """The end of a run's `minutes` of wall-clock time (0: none), and the number of steps that fit
    before it."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.began_at: int | None = None                # the first step of this process
        self.first_measured: tuple | None = None        # (step, seconds of training) after the warm-up

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def steps_that_fit(self, step: int, stopwatch: Stopwatch, eval_interval: int) -> int | None:
        """The number of steps of the whole run; None as long as the pace is not known.

        The pace is measured over ten steps after three of warm-up, or over fewer if they take a
        twentieth of the time. Evaluations are expected to take what they took so far, and a
        thirtieth of the time is kept in reserve.
        """
        synchronize(stopwatch.device)
        seconds = stopwatch.seconds()
        if self.began_at is None:
            self.began_at = step
        if step - self.began_at < 3:
            return None
        if self.first_measured is None:
            self.first_measured = step, seconds
        first_step, first_seconds = self.first_measured
        steps_measured = step - first_step
        seconds_measured = seconds - first_seconds
        if steps_measured == 0 or (steps_measured < 10 and seconds_measured < self.seconds_left() / 20):
            return None
        pause = stopwatch.pause_seconds()
        seconds_per_step = seconds_measured / steps_measured + pause / eval_interval
        usable = self.seconds_left() * 29 / 30 - pause
        return step + max(1, int(usable / seconds_per_step))
