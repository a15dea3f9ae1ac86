"""What is known of one method on one task once it was compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One method on one task. `point` are the tuned values; `test_metrics` are values of `metric`,
    one per seed, on `test_samples` each, and `test_errors` their standard errors; `error` says why
    there are none, `warning` which trials failed. `bd_rate` is relative to the reference method: by
    how much the bytes of its trials' front differ at equal validation metric, -0.5 is half of them;
    None where the two fronts have no range of the metric in common."""

    task: str
    method: str
    point: dict[str, Any] = field(default_factory=dict)
    trials: int = 0
    size_bytes: int = 0
    trained_values: int = 0
    metric: str = "accuracy"
    val_metric: float | None = None
    test_metrics: tuple[float, ...] = ()
    test_errors: tuple[float, ...] = ()
    test_samples: int = 0
    tune_seconds: float = 0.0
    fit_seconds: float = 0.0
    bd_rate: float | None = None
    bd_rate_error: float | None = None
    device: str = ""
    error: str = ""
    warning: str = ""

    @property
    def test_metric(self) -> float:
        """Mean over the seeds."""
        return fmean(self.test_metrics)

    @property
    def seed_deviation(self) -> float:
        """Standard deviation over the seeds; 0 for a single one."""
        return stdev(self.test_metrics) if len(self.test_metrics) > 1 else 0.0

    @property
    def standard_error(self) -> float:
        """Of the mean: that of the seeds, and that of the test set, which all seeds share."""
        variance = fmean(error**2 for error in self.test_errors)
        return float((self.seed_deviation**2 / len(self.test_metrics) + variance) ** 0.5)
