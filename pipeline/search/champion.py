"""The champion: the smallest pack whose validation metric is within a few tenths of a point of the best."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.search.record import TrialRecord
from pipeline.spec import Budget


def choose_champion(records: Sequence[TrialRecord], budget: Budget) -> TrialRecord:
    """Choose among complete trials under `max_bytes`; `within_points` are hundredths of the metric. There must be one."""
    complete = [record for record in records if record.val_metric is not None and record.size_bytes <= budget.max_bytes]
    assert complete, "a study ends with a complete trial or an error"
    best = max(_metric(record) for record in complete)
    near = [record for record in complete if _metric(record) >= best - budget.within_points / 100 - 1e-9]
    return min(near, key=lambda record: (record.size_bytes, -_metric(record), record.id))


def _metric(record: TrialRecord) -> float:
    assert record.val_metric is not None
    return record.val_metric
