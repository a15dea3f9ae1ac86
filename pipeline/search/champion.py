"""The champion: the smallest pack whose validation metric is within a few tenths of a point of the
best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from pipeline.search.trial_record import TrialRecord
from pipeline.specs import Budget


class Candidate(Protocol):
    """The fields that the choice depends on."""

    @property
    def id(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def val_metric(self) -> float | None: ...


Chosen = TypeVar("Chosen", bound=Candidate)


def choose_champion(records: Sequence[TrialRecord], budget: Budget) -> TrialRecord:
    """Choose among complete trials under `max_bytes`. There must be one."""
    complete = [
        record
        for record in records
        if record.val_metric is not None and record.size_bytes <= budget.max_bytes
    ]
    assert complete, "a study ends with a complete trial or an error"
    return smallest_near_best(complete, budget.within_points)


def smallest_near_best(candidates: Sequence[Chosen], within_points: float) -> Chosen:
    """The smallest candidate within `within_points` percentage points of the best; of equal sizes
    the better, then the first id.
    """
    best = max(_metric(each) for each in candidates)
    near = [each for each in candidates if _metric(each) >= best - within_points / 100 - 1e-9]
    return min(near, key=lambda each: (each.size_bytes, -_metric(each), each.id))


def _metric(candidate: Candidate) -> float:
    assert candidate.val_metric is not None
    return candidate.val_metric
