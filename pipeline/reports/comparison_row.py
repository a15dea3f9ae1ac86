"""What is known of one method on one task once it was compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One method on one task. `point` are the tuned values; `test_accuracies` one a seed, of `test_samples` each; `error` says why there are none,
    `warning` which trials failed."""

    task: str
    method: str
    point: dict[str, Any] = field(default_factory=dict)
    trials: int = 0
    size_bytes: int = 0
    trained_values: int = 0
    val_accuracy: float | None = None
    test_accuracies: tuple[float, ...] = ()
    test_samples: int = 0
    tune_seconds: float = 0.0
    fit_seconds: float = 0.0
    device: str = ""
    error: str = ""
    warning: str = ""

    @property
    def test_accuracy(self) -> float:
        """Mean over the seeds."""
        return fmean(self.test_accuracies)

    @property
    def seed_deviation(self) -> float:
        """Standard deviation over the seeds; 0 for a single one."""
        return stdev(self.test_accuracies) if len(self.test_accuracies) > 1 else 0.0

    @property
    def standard_error(self) -> float:
        """Of the mean: that of the seeds, and the binomial one of the test set, which all seeds share."""
        binomial = self.test_accuracy * (1 - self.test_accuracy) / self.test_samples
        return float((self.seed_deviation**2 / len(self.test_accuracies) + binomial) ** 0.5)
