"""Which trials of a comparison start in a time limit."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.driver.comparison_time import ComparisonTime, in_turn
from pipeline.search.time_limit import FINISH_SECONDS, TimeLimit
from pipeline.search.trial_record import TrialRecord

TRIAL = TrialRecord(id="a", point={}, size_bytes=1, state="complete", val_metric=0.5, seconds=10.0)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 3), st.data())
def test_all_methods_have_tried_about_the_same_share_at_any_time(
    counts: list[int], seed: int, data: st.DataObject
) -> None:
    turns = in_turn(counts, seed)
    every = [(method, number) for method, count in enumerate(counts) for number in range(count)]
    assert sorted(turns) == every
    tried = turns[: data.draw(st.integers(len(counts), len(turns)))]
    done = [sum(method == each for each, _ in tried) for method in range(len(counts))]
    assert min(done) >= 1, "each has its turn first"
    share = min(Fraction(one, count) for one, count in zip(done, counts, strict=True))
    for one, count in zip(done, counts, strict=True):
        assert Fraction(one - 1, count) <= share


def time_of(seconds: float, elapsed: float, fits: int = 4) -> ComparisonTime:
    """The time of a task with a limit of which so much has elapsed."""
    now = [0.0]
    limit = TimeLimit(seconds, lambda: now[0])
    now[0] = elapsed
    return ComparisonTime(limit, "task", fits, fit_ratio=1.5)


def test_trials_start_as_long_as_the_fits_still_fit() -> None:
    """Two at once: a trial of 10 s, then two rounds of fits of 15 s."""
    needed = 10 + 2 * 15 + FINISH_SECONDS
    assert time_of(100, 100 - needed).startable(7, [TRIAL], 2) == 2
    assert time_of(100, 100 - needed).startable(1, [TRIAL], 2) == 1
    assert time_of(100, 100 - needed + 1).startable(7, [TRIAL], 2) == 0
    assert time_of(100, 100 - needed + 1, fits=2).startable(7, [TRIAL], 2) == 2


def test_a_trials_duration_is_unknown_at_first() -> None:
    assert time_of(100, 99).startable(7, [], 3) == 3
    assert time_of(100, 100).startable(7, [], 3) == 0


@pytest.mark.parametrize("records", [[], [TRIAL]])
def test_without_a_limit_all_start_at_once(records: list[TrialRecord]) -> None:
    assert ComparisonTime(TimeLimit(), "task", 4, 1.5).startable(7, records, 2) == 7
