"""Metrics by kind and name, and how they are scored. Legend: R sets of weights, N samples."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.kinds.protocol import Outcomes

Values = Callable[[Outcomes, np.ndarray], np.ndarray]
"""Function of outcomes and weights [R, N] that returns the metric under each set of weights,
[R].
"""
RESAMPLES, FEWEST_RESAMPLES = 200, 20
_MOST_NUMBERS = 10**8
"""Most outputs read for one standard error; larger splits get fewer resamples."""


@dataclass(frozen=True)
class Metric:
    """A metric of one kind of task.

    Args:
        values: see `Values`.
        exact_error: its standard error where there is a formula; None takes the bootstrap.
        is_mean_over_classes: whether classes that do not occur are left out of it.
        by_class: the metric of each class alone, [C], NaN where it is not defined; None where
            there is no such thing.
        finer: the metric of the same kind that tells models apart which this one counts as equal;
            None for a metric that needs no help.
    """

    name: str
    kind: str
    values: Values
    exact_error: Callable[[Outcomes], float] | None = None
    is_mean_over_classes: bool = False
    by_class: Callable[[Outcomes], np.ndarray] | None = None
    finer: str | None = None

    def value(self, outcomes: Outcomes) -> float:
        """The metric itself."""
        return float(self.values(outcomes, np.ones((1, len(outcomes))))[0])

    def values_by_class(self, outcomes: Outcomes, classes: Sequence[str]) -> dict[str, float]:
        """The metric of each class alone, of those for which it is defined; empty for a metric
        that has none.
        """
        if self.by_class is None:
            return {}
        values = zip(classes, self.by_class(outcomes).tolist(), strict=True)
        return {name: value for name, value in values if not math.isnan(value)}

    def standard_error(self, outcomes: Outcomes) -> float:
        """Standard error over draws of as many samples; the same for the same outcomes."""
        if self.exact_error is not None:
            return self.exact_error(outcomes)
        return float(self.resampled(outcomes).std(ddof=1))

    def resampled(self, outcomes: Outcomes) -> np.ndarray:
        """The metric under R draws of as many samples with replacement, [R].

        The draws of as many samples are the same for every model, so differences between two
        models on one split are paired.
        """
        affordable = _MOST_NUMBERS // max(1, outcomes.outputs.size)
        resamples = min(RESAMPLES, max(FEWEST_RESAMPLES, affordable))
        rng, samples = np.random.default_rng(0), len(outcomes)
        chunks = (
            rng.multinomial(samples, np.full(samples, 1 / samples), FEWEST_RESAMPLES)
            for _ in range(resamples // FEWEST_RESAMPLES)
        )
        return np.concatenate(
            [self.values(outcomes, weights.astype(np.float64)) for weights in chunks]
        )


@dataclass(frozen=True)
class Score:
    """A metric of one model on one split. `value` is in [0, 1]."""

    metric: str
    value: float
    standard_error: float
    samples: int


def score(metric: Metric, outcomes: Outcomes) -> Score:
    """The metric's value and standard error."""
    value, error = metric.value(outcomes), metric.standard_error(outcomes)
    return Score(metric.name, value, error, len(outcomes))


_METRICS: dict[tuple[str, str], Metric] = {}


def metric(
    name: str,
    kind: str,
    *,
    exact_error: Callable[[Outcomes], float] | None = None,
    is_mean_over_classes: bool = False,
    by_class: Callable[[Outcomes], np.ndarray] | None = None,
    finer: str | None = None,
) -> Callable[[Values], Values]:
    """Decorator: register a function as the metric `name` of a kind. Arguments as `Metric`'s.

    Raises ValueError for a name that the kind has already.
    """

    def register(values: Values) -> Values:
        if (kind, name) in _METRICS:
            raise ValueError(f"the metric {name!r} of {kind} is registered twice; rename one")
        _METRICS[kind, name] = Metric(
            name, kind, values, exact_error, is_mean_over_classes, by_class, finer
        )
        return values

    return register


def metric_named(name: str, kind: str) -> Metric:
    """The metric of a kind. Raises ValueError with those that it has."""
    known = metrics_of(kind)
    if name not in known:
        raise ValueError(f"expected a metric of kind {kind}: {', '.join(sorted(known))}")
    return _METRICS[kind, name]


def metrics_of(kind: str) -> list[str]:
    """The names of a kind's metrics."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return [name for of, name in _METRICS if of == kind]
