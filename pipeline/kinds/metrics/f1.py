"""F1, the harmonic mean of precision and recall, as a mean over the classes that occur.

    f1_c = 2 TP_c / (predicted_c + actual_c)

A class of a multi-label sample is predicted where its probability is above 0.5.
"""

from __future__ import annotations

import numpy as np

from pipeline.kinds.metrics.accuracy import correct
from pipeline.kinds.metrics.registry import metric
from pipeline.kinds.metrics.sums import mean_over_classes, sums_by_class
from pipeline.kinds.protocol import Outcomes


@metric("f1", "classification", is_mean_over_classes=True, finer="likelihood")
def f1(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Of the class with the largest logit."""
    classes, targets_N = outcomes.outputs.shape[1], outcomes.targets
    hits_RC = sums_by_class(targets_N, weights_RN * correct(outcomes), classes)
    actual_RC = sums_by_class(targets_N, weights_RN, classes)
    predicted_RC = sums_by_class(outcomes.outputs.argmax(axis=1), weights_RN, classes)
    return _mean_f1(hits_RC, predicted_RC, actual_RC)


@metric("f1", "multilabel", is_mean_over_classes=True)
def f1_of_labels(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Of the classes with a positive logit."""
    predicted_NC, actual_NC = outcomes.outputs > 0, outcomes.targets > 0
    hits_NC = predicted_NC & actual_NC
    sums = (
        weights_RN @ each_NC.astype(np.float64) for each_NC in (hits_NC, predicted_NC, actual_NC)
    )
    return _mean_f1(*sums)


def _mean_f1(hits_RC: np.ndarray, predicted_RC: np.ndarray, actual_RC: np.ndarray) -> np.ndarray:
    f1_RC = 2 * hits_RC / np.maximum(predicted_RC + actual_RC, 1e-12)
    return mean_over_classes(f1_RC, actual_RC > 0)
