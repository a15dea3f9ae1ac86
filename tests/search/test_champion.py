"""When a trial is stopped, which trials are on the front, and which is the champion."""

from __future__ import annotations

import random

from helpers_cases import for_every
from helpers_study import (
    quick,
    record,
)
from hypothesis import given
from hypothesis import strategies as st

from pipeline.search.champion import choose_champion
from pipeline.search.pareto import pareto_front
from pipeline.search.stopping import is_dominated
from pipeline.search.trial_record import TrialRecord
from pipeline.specs import (
    Budget,
)


# Two standard errors are 0.1.
@for_every(
    ("curve", "earlier", "stops"),
    [
        ([0.4, 0.5], [record(100, 0.4, 0.61, 0.7)], True),
        ([0.4, 0.5], [record(100, 0.4, 0.59, 0.9)], False),
        ([0.4, 0.5], [record(99, 0.4, 0.61)], True),
        ([0.4, 0.5], [record(101, 0.9, 0.9)], False),
        ([0.4, 0.5], [record(100, 0.9)], False),
        ([0.4, 0.5], [record(100, 0.4, 0.5), record(100, 0.4, 0.65)], True),
        ([0.4, 0.5], [record(100, 0.4, 0.65, state="stopped")], True),
        ([0.4, 0.5], [record(100, 0.4, 0.65, state="failed")], False),
        ([0.4, 0.5], [], False),
        ([0.1], [record(1, 0.9)], False),
        ([0.1, 0.1], [record(1, 0.9, 0.9)], True),
        ([0.1] * 5, [record(1, *[0.9] * 6)], True),
        ([0.1] * 6, [record(1, *[0.9] * 6)], False),
        ([0.0, 0.0], [record(1, 0.0, 0.0)], False),
    ],
)
def test_a_trial_stops_where_an_earlier_no_larger_one_was_clearly_better(
    curve: list[float], earlier: list[TrialRecord], stops: bool
) -> None:
    assert is_dominated(curve, 0.05, 6, 100, earlier) is stops


CURVES = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.integers(0, 5),
        st.sampled_from(["complete", "complete", "stopped", "rejected"]),
    ),
    max_size=12,
)


@quick
@given(CURVES, st.randoms(use_true_random=False))
def test_the_front_holds_what_no_other_trial_beats(
    trials: list[tuple[int, int, str]], order: random.Random
) -> None:
    rows = [
        record(size, metric / 5, state=state, identity=f"{number:02d}").row()
        for number, (size, metric, state) in enumerate(trials)
    ]
    complete = [row for row in rows if row["state"] == "complete"]

    def beats(a: dict, b: dict) -> bool:
        alike = (a["size_bytes"], a["val_metric"]) == (b["size_bytes"], b["val_metric"])
        return (
            a["size_bytes"] <= b["size_bytes"]
            and a["val_metric"] >= b["val_metric"]
            and (not alike or a["id"] < b["id"])
        )

    expected = [
        row
        for row in complete
        if not any(beats(other, row) for other in complete if other is not row)
    ]
    assert pareto_front(rows) == sorted(expected, key=lambda row: row["size_bytes"])
    order.shuffle(rows)
    assert pareto_front(rows) == sorted(expected, key=lambda row: row["size_bytes"])


@for_every(
    ("records", "champion"),
    [
        ([record(100, 0.8), record(50, 0.795), record(20, 0.7949)], 50),
        ([record(100, 0.8), record(50, 0.794)], 100),
        ([record(100, 0.8), record(300, 0.99)], 100),
        (
            [record(100, 0.8), record(50, 0.9, state="stopped"), record(40, 0.9, state="failed")],
            100,
        ),
        ([record(200, 0.9), record(100, 0.9)], 100),
    ],
)
def test_the_champion_is_the_smallest_close_to_the_best(
    records: list[TrialRecord], champion: int
) -> None:
    budget = Budget(max_bytes=200, within_points=0.5)
    assert choose_champion(records, budget).size_bytes == champion
    assert choose_champion(records[::-1], budget).size_bytes == champion


def test_of_champions_of_one_size_the_better_is_chosen_then_the_first_id() -> None:
    better, worse = record(100, 0.9, identity="z"), record(100, 0.899, identity="a")
    assert choose_champion([worse, better], Budget()) is better
    twin = record(100, 0.9, identity="y")
    assert choose_champion([better, twin], Budget()) is twin
