"""Calibrated probabilities and sets of classes, from the validation outputs of a trial.

The temperature T minimises the cross-entropy of logits / T (Guo et al. 2017, arXiv 1706.04599). The
threshold is that of split conformal prediction with least ambiguous sets (Sadinle, Lei & Wasserman
2019, "Least ambiguous set-valued classifiers with bounded error levels"; Angelopoulos & Bates 2021,
arXiv 2107.07511): of the N probabilities of the right classes, the ceil((N + 1) coverage)-th
largest. A set holds every class that is at least as probable. If the N samples and the next one are
exchangeable, and the model has seen none of them, the set holds the right class with probability
`coverage` or more, and with at most 1 / (N + 1) more.

Legend: N samples, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from pipeline.errors import SpecError
from pipeline.kinds import Outcomes
from pipeline.packs import Calibration

_TEMPERATURES = (0.05, 20.0)


def check_samples(coverage: float, samples: int) -> None:
    """Raises SpecError where so few validation samples cannot tell the threshold."""
    needed = math.ceil(coverage / (1 - coverage) - 1e-9)
    if samples < needed:
        raise SpecError(
            f"coverage: given {coverage}, which needs {needed} validation samples or more; the task"
            f" has {samples}: lower it, or hold out more (val_fraction)"
        )


def calibrate(outcomes: Outcomes, coverage: float) -> Calibration:
    """Temperature and threshold from logits [N, C] and classes [N]. Raises SpecError."""
    check_samples(coverage, len(outcomes))
    logits_NC = outcomes.outputs.astype(np.float64)
    targets_N = outcomes.targets.astype(np.int64)
    temperature = _temperature(logits_NC, targets_N)
    right_N = of_targets(probabilities(logits_NC, temperature), targets_N)
    rank = math.ceil((len(right_N) + 1) * coverage - 1e-9)
    threshold = np.float32(np.sort(right_N)[::-1][rank - 1])
    below = np.nextafter(threshold, np.float32(0))  # rounding must not leave its own sample out
    return Calibration(coverage, len(right_N), temperature, float(below))


@dataclass(frozen=True)
class SetQuality:
    """How the sets of a calibration do on samples that it was not made of."""

    stated: float
    """The coverage that the calibration promises."""
    found: float
    """The share of sets that hold the right class."""
    standard_error: float
    mean_size: float
    """The mean number of classes in a set."""


def quality_of_sets(outcomes: Outcomes, calibration: Calibration) -> SetQuality:
    """Measure a calibration on logits [N, C] and classes [N] of other samples."""
    shares_NC = probabilities(outcomes.outputs, calibration.temperature)
    held_N = of_targets(shares_NC, outcomes.targets.astype(np.int64)) >= calibration.threshold
    found = float(held_N.mean())
    return SetQuality(
        stated=calibration.coverage,
        found=found,
        standard_error=math.sqrt(found * (1 - found) / len(held_N)),
        mean_size=float((shares_NC >= calibration.threshold).sum(axis=1).mean()),
    )


def probabilities(logits_NC: np.ndarray, temperature: float) -> np.ndarray:
    """Calibrated probabilities [N, C]."""
    found: np.ndarray = softmax(logits_NC.astype(np.float64) / temperature, axis=1)
    return found


def _temperature(logits_NC: np.ndarray, targets_N: np.ndarray) -> float:
    """Rounded to float16, so that another machine finds the same."""

    def cross_entropy(log_temperature: float) -> float:
        scaled = log_softmax(logits_NC / math.exp(log_temperature), axis=1)
        return float(-of_targets(scaled, targets_N).mean())

    bounds = tuple(map(math.log, _TEMPERATURES))
    found = minimize_scalar(cross_entropy, bounds=bounds, method="bounded")
    return float(np.float16(math.exp(found.x)))


def of_targets(values_NC: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """Each row's value of its target, [N]."""
    found: np.ndarray = values_NC[np.arange(len(targets_N)), targets_N]
    return found
