"""When a trial is stopped, which trials are on the front, and which is the champion."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import numpy as np
import pytest
from helpers_cases import for_every
from helpers_study import (
    quick,
    record,
)
from hypothesis import given
from hypothesis import strategies as st

from pipeline.kinds import Outcomes
from pipeline.kinds.metrics import metric_named, score
from pipeline.search.champion import choose_champion
from pipeline.search.pareto import pareto_front
from pipeline.search.stopping import is_dominated
from pipeline.search.trial_record import TrialRecord
from pipeline.specs import Budget, Task


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


# --- the champion ---------------------------------------------------------------------------------

SAMPLES = 400


def answers(wrong: Iterable[int], samples: int = SAMPLES) -> Outcomes:
    """Logits of two classes that are wrong at these samples."""
    targets = np.arange(samples) % 2
    choices = targets.copy()
    choices[list(wrong)] ^= 1
    return Outcomes(np.eye(2, dtype=np.float32)[choices], targets)


def study(**trials: tuple[int, Outcomes]) -> tuple[list[TrialRecord], dict[str, Outcomes]]:
    """Complete trials, by id, of a size and with validation outputs."""
    outcomes = {name: kept for name, (_, kept) in trials.items()}
    scores = {name: score(ACCURACY, kept).value for name, kept in outcomes.items()}
    records = [record(size, scores[name], identity=name) for name, (size, _) in trials.items()]
    return records, outcomes


ACCURACY = metric_named("accuracy", "classification")


def chosen(
    tiny_task: Task, records: list[TrialRecord], outcomes: dict[str, Outcomes], level: float = 0.05
) -> list[str]:
    task = tiny_task.changed(budget=Budget(max_bytes=200, level=level))
    found = choose_champion(records, task, outcomes.get)
    assert choose_champion(records[::-1], task, outcomes.get) == found
    return [each.id for each in found]


def mcnemar(only_best: int, only_other: int) -> float:
    """Exact one-sided p-value of "the other is worse", ties between the two counted half."""
    n = only_best + only_other
    tail = sum(math.comb(n, k) for k in range(only_best + 1, n + 1))
    return (tail + math.comb(n, only_best) / 2) / 2**n


@for_every(
    ("only_best", "only_other"), [(8, 0), (10, 2), (12, 4), (22, 10), (9, 4), (6, 4), (30, 26)]
)
@pytest.mark.parametrize("level", [0.05, 0.16])
def test_the_smaller_pack_is_chosen_unless_mcnemars_test_says_it_is_worse(
    tiny_task: Task, only_best: int, only_other: int, level: float
) -> None:
    """None of these cases is close to the levels; the test itself is a bootstrap."""
    p = mcnemar(only_best, only_other)
    assert abs(p - level) > 0.02, p
    best, small = answers(range(only_other)), answers(range(100, 100 + only_best))
    found = chosen(tiny_task, *study(best=(100, best), small=(50, small)), level=level)
    assert found == (["small", "best"] if p >= level else ["best"])


def test_the_comparison_is_paired(tiny_task: Task) -> None:
    """The same difference of two points is within noise where both err on many other samples."""
    alike = study(best=(100, answers(range(40))), small=(50, answers(range(48))))
    assert chosen(tiny_task, *alike) == ["best"]
    apart = study(best=(100, answers(range(40))), small=(50, answers(range(100, 148))))
    assert chosen(tiny_task, *apart) == ["small", "best"]


def test_a_pack_that_gives_right_classes_less_probability_is_worse(tiny_task: Task) -> None:
    """One error of 60 more is within noise, a third of the confidence is not."""
    best = answers([], samples=60)
    unsure = Outcomes(best.outputs / 3, best.targets)
    outputs = best.outputs.copy()
    outputs[0] = outputs[0, ::-1]
    alike = Outcomes(outputs, best.targets)
    packs = study(best=(100, best), alike=(60, alike), unsure=(50, unsure))
    assert chosen(tiny_task, *packs) == ["alike", "best"]
    assert chosen(tiny_task, *packs, level=0.5) == ["best"]
    equal = study(small=(50, unsure), large=(100, best))
    assert chosen(tiny_task, *equal, level=0.5) == ["large"]


def test_only_complete_trials_within_the_budget_are_candidates(tiny_task: Task) -> None:
    records, outcomes = study(
        fits=(100, answers(range(40))), better=(300, answers([])), equal=(200, answers(range(40)))
    )
    others = [record(50, 0.9, state="stopped"), record(40, 0.9, state="failed")]
    assert chosen(tiny_task, records + others, outcomes) == ["fits", "equal"]


def test_without_outputs_of_the_same_samples_only_the_metric_counts(tiny_task: Task) -> None:
    records, outcomes = study(
        best=(100, answers(range(40))),
        lost=(50, answers(range(41))),
        other=(60, answers([*range(100, 121)], samples=200)),
        equal=(70, answers(range(40))),
    )
    del outcomes["lost"]
    assert chosen(tiny_task, records, outcomes) == ["equal", "best"]
    assert chosen(tiny_task, records, {}) == ["equal", "best"]


def test_of_champions_of_one_size_the_better_is_chosen_then_the_first_id(tiny_task: Task) -> None:
    records, outcomes = study(
        z=(100, answers(range(40))), a=(100, answers(range(41))), y=(100, answers(range(40)))
    )
    assert chosen(tiny_task, records, outcomes, level=0.5) == ["y", "z"]
