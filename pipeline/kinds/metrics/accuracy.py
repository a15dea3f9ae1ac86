"""The share of samples classified correctly: of all, or the mean of each class's share.

accuracy           correct / N                          se = sqrt(p (1 - p) / N)
balanced_accuracy  mean_c p_c,  p_c = correct_c / N_c   se = sqrt(sum_c p_c (1 - p_c) / N_c) / C
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.kinds.metrics.registry import metric
from pipeline.kinds.metrics.sums import mean_over_classes, sums_by_class
from pipeline.kinds.protocol import Outcomes


def correct(outcomes: Outcomes) -> np.ndarray:
    """Which samples have the largest logit at their class, bool [N]."""
    found: np.ndarray = outcomes.outputs.argmax(axis=1) == outcomes.targets
    return found


def _binomial_error(outcomes: Outcomes) -> float:
    accuracy = float(correct(outcomes).mean())
    return math.sqrt(accuracy * (1 - accuracy) / len(outcomes))


@metric("accuracy", "classification", exact_error=_binomial_error, finer="likelihood")
def accuracy(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Share of samples."""
    share: np.ndarray = weights_RN @ correct(outcomes) / weights_RN.sum(axis=1)
    return share


def _recalls(outcomes: Outcomes, weights_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each class's share and its weight, [R, C]."""
    classes, targets_N = outcomes.outputs.shape[1], outcomes.targets
    weight_RC = sums_by_class(targets_N, weights_RN, classes)
    correct_RC = sums_by_class(targets_N, weights_RN * correct(outcomes), classes)
    return correct_RC / np.maximum(weight_RC, 1e-12), weight_RC


def _error_of_mean(outcomes: Outcomes) -> float:
    recalls_1C, counts_1C = _recalls(outcomes, np.ones((1, len(outcomes))))
    recall_C, count_C = recalls_1C[counts_1C > 0], counts_1C[counts_1C > 0]
    variance_C = recall_C * (1 - recall_C) / count_C
    return math.sqrt(variance_C.sum()) / len(count_C)


@metric(
    "balanced_accuracy",
    "classification",
    exact_error=_error_of_mean,
    is_mean_over_classes=True,
    finer="likelihood",
)
def balanced_accuracy(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Mean over the classes that occur of each one's share."""
    recalls_RC, weight_RC = _recalls(outcomes, weights_RN)
    return mean_over_classes(recalls_RC, weight_RC > 0)
