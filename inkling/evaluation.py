"""How often a run evaluates, and on how many windows, where eval_interval and eval_iters leave it
open: arithmetic, so that a resumed run does the same. (By the clock, the first fit of the steps to the
time sets the steps between evaluations anew; see inkling/clock.py.)

A forward pass is a third of a training step's work, so an evaluated token costs a third of a trained
one. All evaluations of a run together may cost SHARE of its training.
"""

import math
from dataclasses import dataclass

SHARE = 0.08
COST = 1 / 3                    # of an evaluated token, in trained ones
BATCH = 16                      # eval_iters counts batches of this many windows


@dataclass
class Evaluations:
    """interval: steps between evaluations; there is one before the first step and one after the last,
    too. windows: of each split, at each of them. at_the_end: windows of the val split in a last pass over
    the best weights; 0 where the others read all of it anyway, or the user has set their number."""

    interval: int
    windows: int
    at_the_end: int


def plan_evaluations(steps: int, step_windows: int, val_windows: int, eval_interval, eval_iters) -> Evaluations:
    """The evaluations of a run of `steps` steps of `step_windows` windows each. val_windows: those of
    the whole val split. eval_interval, eval_iters: the settings, numbers or "auto"."""
    interval = choose_interval(steps) if eval_interval == "auto" else eval_interval
    if eval_iters != "auto":
        return Evaluations(interval, min(val_windows, BATCH * eval_iters or val_windows), 0)
    if eval_interval != "auto":
        return choose_windows(steps, step_windows, val_windows, interval)
    for most in (10, 5, 2, 1):          # rather few evaluations than some that say nothing
        evaluations = choose_windows(steps, step_windows, val_windows, choose_interval(steps, most))
        if evaluations.windows >= min(BATCH, val_windows):
            break
    return evaluations


def choose_windows(steps: int, step_windows: int, val_windows: int, interval: int) -> Evaluations:
    """The evaluations every `interval` steps that SHARE allows; the arguments are plan_evaluations's."""
    budget = SHARE * steps * step_windows / COST                # in windows
    count = count_evaluations(steps, interval)
    if count * 2 * val_windows <= budget:
        return Evaluations(interval, val_windows, 0)
    at_the_end = max(1, min(val_windows, int(budget / 3)))
    windows = int((budget - at_the_end) / (2 * count))
    if windows > BATCH:
        windows -= windows % BATCH      # so that eval_iters can say it
    return Evaluations(interval, max(1, min(windows, val_windows)), at_the_end)


def choose_interval(steps: int, times: int = 10) -> int:
    """The largest round number, such as 20, 25, 50 or 100, that a run has at least so many times."""
    most = max(1, steps // times)
    if most < 10:
        return most
    unit = 10 ** (len(str(most)) - 1)
    round_numbers = [unit, 2 * unit, 5 * unit // 2, 5 * unit]
    return max(number for number in round_numbers if number <= most)


def count_evaluations(steps: int, interval: int) -> int:
    """How many evaluations a whole run makes."""
    return math.ceil(steps / interval) + 1


def cost_of(evaluations: Evaluations, steps: int, step_windows: int) -> float:
    """What the evaluations cost, as a share of the training."""
    windows = 2 * evaluations.windows * count_evaluations(steps, evaluations.interval) + evaluations.at_the_end
    return COST * windows / max(1, steps * step_windows)
