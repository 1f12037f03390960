"""The time of a run: a stopwatch that counts only training, the deadline that --max_minutes sets,
and the number of steps that fit before it."""

import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

from inkling.device import synchronize


class Stopwatch:
    """Seconds of training. It stands still while evaluation, sampling and saving are `paused()`.

    seconds_before: what earlier processes of a resumed run have counted. pause_before: how long one
    of their evaluations took.
    """

    def __init__(self, device: str, seconds_before: float = 0.0, pause_before: float = 0.0):
        self.device = device
        self.pause_before = pause_before
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
        """Seconds that an evaluation takes, with its saves and its sample: the mean so far; before
        the first, what an earlier process of the run has measured."""
        if not self.evaluations:
            return self.pause_before
        return self.paused_seconds / self.evaluations


def process_start() -> float:
    """When this process was started, on the clock of time.monotonic: on Linux exactly, elsewhere
    by the processor time that it has used since."""
    try:
        if not hasattr(os, "sysconf"):
            return time.monotonic() - time.process_time()
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")        # since the system's start
        return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, LookupError, AttributeError):
        return time.monotonic() - time.process_time()


class Deadline:
    """The end of a run's `minutes` of wall-clock time (0: none).

    began: when they began, by time.monotonic; None: now. used: the seconds of them that earlier
    processes of a resumed run have taken. now: the clock; None: time.monotonic."""

    def __init__(self, minutes: float, began: float | None = None, used: float = 0.0, now=None):
        self.now = now or time.monotonic
        self.began = self.now() if began is None else began
        self.used = used
        self.end = self.began + 60 * minutes - used if minutes else math.inf

    def seconds_left(self) -> float:
        return self.end - self.now()

    def seconds_used(self) -> float:
        return self.used + self.now() - self.began


class StepFitter:
    """Fits the number of steps to a deadline: as soon as some steps have shown the pace, and again
    whenever half of the time or of the steps that were left have gone by. A run that slows down or speeds
    up meanwhile therefore still ends on time.

    The first two steps warm up, and compile the optimizer, so they are not counted, unless they take so
    long that few more fit. After each fit the pace is measured anew.
    """

    WARM_UP = 2
    STEPS_MEASURED = 8                  # before the first fit, unless they take long
    PAUSES = 0.05                       # at most twice this share of the time goes into evaluations ...
    PAUSES_OF_FEW = 0.2                 # ... unless there would be fewer than five: then this share at most
    EXIT_SECONDS = 2.5                  # for the picture, the summary, and what Python does at exit

    def __init__(self, deadline: Deadline, stopwatch: Stopwatch, first_step: int, only_cuts: bool = False,
                 most_steps: int = 0):
        """only_cuts: the number of steps is given, and the deadline can only end the run earlier. most_steps: of the
        whole run, even if there is time for more; 0: any number."""
        self.only_cuts = only_cuts
        self.most_steps = most_steps or math.inf
        self.deadline = deadline
        self.stopwatch = stopwatch
        self.first_step = first_step
        self.mark: tuple | None = None              # (step, seconds of training) from which the pace is measured
        self.left_at_last_fit: float | None = None
        self.halfway: int | None = None             # the step in the middle between the last fit and the end

    def is_due(self, step: int) -> bool:
        """Whether to fit before update number `step`."""
        left = self.deadline.seconds_left()
        if left <= 0:
            return True
        if self.only_cuts:
            return False
        if self.mark is None:
            self.mark = step, self.stopwatch.seconds()
        steps = step - self.mark[0]
        if self.left_at_last_fit is not None:
            return steps > 0 and (left <= self.left_at_last_fit / 2 or step >= self.halfway)
        seconds = self.stopwatch.seconds() - self.mark[1]
        if step - self.first_step == self.WARM_UP and seconds < left / 5:
            synchronize(self.stopwatch.device)
            self.mark = step, self.stopwatch.seconds()
            return False
        return steps >= self.STEPS_MEASURED or (steps > 0 and seconds > left / 5)

    def fit(self, step: int, choose_interval, last_pass_seconds: float) -> tuple:
        """(the number of steps of the whole run that fits now, the steps between its evaluations). The
        number is `step` itself if no more fit.

        choose_interval(steps, times): the steps between evaluations of a run of `steps`, of which at
        least `times` fit into the time. last_pass_seconds: what the last pass over the val split takes."""
        synchronize(self.stopwatch.device)
        left = self.deadline.seconds_left()
        if left <= 0 or self.mark is None or step == self.mark[0]:
            end = max(step, self.first_step + 1)
            return end, choose_interval(end, 1)
        first_step, first_seconds = self.mark
        seconds = self.stopwatch.seconds()
        seconds_per_step = (seconds - first_seconds) / (step - first_step)
        self.mark = step, seconds
        self.left_at_last_fit = left
        pause = self.stopwatch.pause_seconds()
        usable = left - pause - last_pass_seconds - self.EXIT_SECONDS
        most_left = max(0, self.most_steps - step)
        without_evaluations = max(0, min(most_left, int(usable / seconds_per_step)))
        interval = choose_interval(step + without_evaluations, self.times_to_evaluate(left, pause))
        steps_left = max(0, min(most_left, int(usable / (seconds_per_step + pause / interval))))
        if steps_left < interval:       # none but the last comes
            steps_left = min(interval - 1, without_evaluations)
        self.halfway = step + max(1, steps_left // 2)
        return step + steps_left, interval

    def times_to_evaluate(self, left: float, pause: float) -> int:
        """How many evaluations of `pause` seconds each the `left` seconds should have at least: ten if
        they cost little; else five, so that there is a model to keep after a fifth of the time; fewer if
        those cost much."""
        cheap = int(self.PAUSES * left / max(1e-3, pause))
        bearable = int(self.PAUSES_OF_FEW * left / max(1e-3, pause))
        return max(1, min(10, cheap), min(5, bearable))
