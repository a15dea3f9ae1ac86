"""BD-rate: the average difference in bytes between two fronts at equal quality (G. Bjøntegaard,
VCEG-M33, 2001).

Each front's log bytes are interpolated over the metric by a monotone cubic (PCHIP, as in JCT-VC's
common test conditions) and averaged over the range of the metric that both fronts cover. Legend: T
trials, R resamples of the validation samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from pipeline.search.pareto import on_front

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The trials of one method: bytes [T], metric [T], and the metric under R resamples [R, T]."""

    bytes_T: Floats
    metric_T: Floats
    resampled_RT: Floats


@dataclass(frozen=True)
class BdRate:
    """Bytes relative to the reference at equal quality: -0.6 is 60 % fewer."""

    value: float
    standard_error: float


def compare_curves(reference: Curve, other: Curve) -> BdRate | None:
    """The BD-rate of `other`; None where the two fronts have no range of the metric in common.

    The resamples of both are of the same samples, so the standard error is that of a paired
    comparison. It is over the resamples in which the fronts still overlap, and not a number where
    fewer than two do.
    """
    value = bd_rate(reference.bytes_T, reference.metric_T, other.bytes_T, other.metric_T)
    if value is None:
        return None
    resampled = (
        bd_rate(reference.bytes_T, reference_T, other.bytes_T, other_T)
        for reference_T, other_T in zip(reference.resampled_RT, other.resampled_RT, strict=True)
    )
    values = [each for each in resampled if each is not None]
    return BdRate(value, float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"))


def bd_rate(
    reference_bytes_T: Floats,
    reference_metric_T: Floats,
    other_bytes_T: Floats,
    other_metric_T: Floats,
) -> float | None:
    """Average relative difference in bytes between the fronts of two sets of trials; None where
    their ranges of the metric do not overlap.
    """
    fronts = [
        _front(reference_bytes_T, reference_metric_T),
        _front(other_bytes_T, other_metric_T),
    ]
    low = max(metric[0] for _, metric in fronts)
    high = min(metric[-1] for _, metric in fronts)
    if not low < high:
        return None
    means = [
        float(PchipInterpolator(metric, np.log(sizes)).integrate(low, high)) / (high - low)
        for sizes, metric in fronts
    ]
    return float(np.exp(means[1] - means[0]) - 1)


def _front(bytes_T: Floats, metric_T: Floats) -> tuple[Floats, Floats]:
    """Bytes and metric of the trials on the front, both ascending."""
    front = on_front(bytes_T.tolist(), metric_T.tolist())
    return bytes_T[front], metric_T[front]
