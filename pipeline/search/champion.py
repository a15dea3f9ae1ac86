"""The champion: the smallest pack that is not significantly worse than the best.

Two packs are compared on the same validation samples, by a paired bootstrap of the task's metric:
of R draws of as many samples with replacement, the share in which the smaller pack is at least as
good as the best is the p-value of "the smaller one is worse". It is significantly worse below the
level. At a level of 0.5 the best itself is nearly always chosen; smaller levels buy smaller packs.

A count of errors tells little on few samples: of 60, one error more or less is within noise. So a
metric that counts errors names a finer one, and the smaller pack must be worse by neither
(benchmarks/results/champion_likelihood.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

from pipeline.kinds import Outcomes
from pipeline.kinds.metrics import Metric, metric_named
from pipeline.search.trial_record import TrialRecord
from pipeline.specs import Task


class Candidate(Protocol):
    """The fields that the choice depends on."""

    @property
    def id(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def val_metric(self) -> float | None: ...


Chosen = TypeVar("Chosen", bound=Candidate)


def choose_champion(
    records: Sequence[TrialRecord], task: Task, outcomes: Callable[[str], Outcomes | None]
) -> list[TrialRecord]:
    """The complete trials under `max_bytes` that are not significantly worse than the best; the
    first of them is the champion. There must be a complete trial.

    Args:
        outcomes: the validation outputs of a trial by its id, see `TrialJournal.outcomes`.
    """
    complete = [
        record
        for record in records
        if record.val_metric is not None and record.size_bytes <= task.budget.max_bytes
    ]
    assert complete, "a study ends with a complete trial or an error"
    metric = metric_named(task.metric, task.kind)
    found = not_worse_than_best(
        complete, lambda record: outcomes(record.id), metric, task.budget.level
    )
    return list(found)


def not_worse_than_best(
    candidates: Sequence[Chosen],
    outcomes: Callable[[Chosen], Outcomes | None],
    metric: Metric,
    level: float,
) -> Iterator[Chosen]:
    """Yield the candidates that are not significantly worse than the best, by ascending size; of
    equal sizes the better first, then the first id. Of several with the best metric, the best is
    the best by the finer one, then the smallest.

    Candidates without validation outputs, or with those of other samples, are compared by the
    metric alone.
    """
    ordered = sorted(candidates, key=lambda each: (each.size_bytes, -_metric(each), each.id))
    finer = [metric_named(metric.finer, metric.kind)] if metric.finer else []
    best = _best(ordered, outcomes, finer)
    of_best, draws_of_best = outcomes(best), list[np.ndarray]()
    for each in ordered:
        pair = _paired(outcomes(each), of_best)
        if pair is None or each is best:
            if _metric(each) >= _metric(best):
                yield each
            continue
        metrics = [metric, *finer]
        draws_of_best = draws_of_best or [one.resampled(pair[1]) for one in metrics]
        draws = (one.resampled(pair[0]) for one in metrics)
        if all(
            (own >= others).mean() >= level
            for own, others in zip(draws, draws_of_best, strict=True)
        ):
            yield each


def _best(
    ordered: Sequence[Chosen],
    outcomes: Callable[[Chosen], Outcomes | None],
    finer: Sequence[Metric],
) -> Chosen:
    """The candidate with the best metric; of several, the best by the finer one, then the first."""
    highest = max(map(_metric, ordered))
    tied = [each for each in ordered if _metric(each) >= highest]

    def values(each: Chosen) -> list[float]:
        found = outcomes(each)
        return [] if found is None else [one.value(found) for one in finer]

    return tied[0] if len(tied) == 1 else max(tied, key=values)


def _paired(one: Outcomes | None, other: Outcomes | None) -> tuple[Outcomes, Outcomes] | None:
    """Both, where both are known and of the same samples."""
    if one is None or other is None or not np.array_equal(one.targets, other.targets):
        return None
    return one, other


def _metric(candidate: Candidate) -> float:
    assert candidate.val_metric is not None
    return candidate.val_metric
