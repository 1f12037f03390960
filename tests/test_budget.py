"""Evaluations cost at most 8% of a run's training, by arithmetic alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inkling.evaluation import SHARE, choose_interval, cost_of, count_evaluations, plan_evaluations

WHOLE = st.integers(1, 10**5)


@given(WHOLE, st.integers(1, 512), WHOLE)
def test_all_evaluations_together_cost_at_most_their_share(steps, step_windows, val_windows):
    evaluations = plan_evaluations(steps, step_windows, val_windows, "auto", "auto")
    assert 1 <= evaluations.windows <= val_windows
    assert evaluations.at_the_end <= val_windows
    at_least = (2 * count_evaluations(steps, evaluations.interval) + 1) / 3 / (steps * step_windows)    # a window each
    assert cost_of(evaluations, steps, step_windows) <= max(SHARE, at_least) + 1e-9


@given(st.integers(10, 10**6), st.sampled_from([1, 2, 5, 10]))
def test_the_interval_is_a_round_number_that_fits_often_enough(steps, times):
    interval = choose_interval(steps, times)
    assert times <= steps / interval < 3 * times or interval == 1
    if interval >= 10:
        assert str(interval).rstrip("0") in ("1", "2", "25", "5")


def test_a_full_pass_where_it_fits_and_else_one_at_the_end():
    full = plan_evaluations(1000, 32, 100, "auto", "auto")
    assert (full.windows, full.at_the_end) == (100, 0)
    part = plan_evaluations(1000, 32, 2000, "auto", "auto")
    assert part.windows < 2000 == part.at_the_end
    assert part.windows % 16 == 0


def test_few_steps_are_evaluated_seldom_rather_than_on_a_window_or_two():
    assert plan_evaluations(30, 12, 4000, "auto", "auto").windows >= 8


@pytest.mark.parametrize(("eval_iters", "windows"), [(0, 500), (3, 48), (99, 500)])
def test_what_is_typed_is_kept(eval_iters, windows):
    evaluations = plan_evaluations(10, 4, 500, 7, eval_iters)
    assert (evaluations.interval, evaluations.windows, evaluations.at_the_end) == (7, windows, 0)
