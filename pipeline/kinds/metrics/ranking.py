"""How well each class's scores rank samples that have it above those that have not.

    auroc  the probability that a sample of the class scores higher than another, ties count half
    mAP    mean over the classes of average precision, sum_t (R_t - R_{t-1}) P_t over thresholds t

Samples of equal scores share a threshold. Both are means over the classes that occur:
average precision needs a sample of the class, auroc also one of another. A class's score is its
probability, by softmax or by sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.kinds.metrics.registry import metric
from pipeline.kinds.metrics.sums import mean_over_classes
from pipeline.kinds.protocol import Outcomes

_OfClass = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From weights of positives and of negatives [R, N], highest score first, and the last place with
the same score [N], to a class's value; not a number where there is none."""


@metric("auroc", "classification", is_mean_over_classes=True)
def auroc(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Each class against the rest."""
    return _over_classes(_area, softmax(outcomes.outputs), _one_hot(outcomes), weights_RN)


@metric("mAP", "classification", is_mean_over_classes=True)
def mean_average_precision(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Each class against the rest."""
    scores_NC = softmax(outcomes.outputs)
    return _over_classes(_average_precision, scores_NC, _one_hot(outcomes), weights_RN)


@metric("auroc", "multilabel", is_mean_over_classes=True)
def auroc_of_labels(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Each class by itself."""
    return _over_classes(_area, outcomes.outputs, outcomes.targets > 0, weights_RN)


@metric("mAP", "multilabel", is_mean_over_classes=True)
def mean_average_precision_of_labels(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Each class by itself."""
    return _over_classes(_average_precision, outcomes.outputs, outcomes.targets > 0, weights_RN)


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Probabilities [N, C]."""
    exp_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    probabilities: np.ndarray = exp_NC / exp_NC.sum(axis=1, keepdims=True)
    return probabilities


def _one_hot(outcomes: Outcomes) -> np.ndarray:
    one_hot: np.ndarray = outcomes.targets[:, None] == np.arange(outcomes.outputs.shape[1])
    return one_hot


def _over_classes(
    of_class: _OfClass, scores_NC: np.ndarray, is_positive_NC: np.ndarray, weights_RN: np.ndarray
) -> np.ndarray:
    values_RC = np.empty((len(weights_RN), scores_NC.shape[1]))
    for number, (scores_N, is_positive_N) in enumerate(
        zip(scores_NC.T, is_positive_NC.T, strict=True)
    ):
        order_N = np.argsort(-scores_N, kind="stable")
        sorted_N = scores_N[order_N]
        last_N = np.searchsorted(-sorted_N, -sorted_N, side="right") - 1
        weights = weights_RN[:, order_N]
        positive_RN = weights * is_positive_N[order_N]
        values_RC[:, number] = of_class(positive_RN, weights - positive_RN, last_N)
    return mean_over_classes(values_RC, ~np.isnan(values_RC))


def _average_precision(
    positive_RN: np.ndarray, negative_RN: np.ndarray, last_N: np.ndarray
) -> np.ndarray:
    hits_RN = positive_RN.cumsum(axis=1)[:, last_N]
    taken_RN = (positive_RN + negative_RN).cumsum(axis=1)[:, last_N]
    precision_RN = hits_RN / np.maximum(taken_RN, 1e-12)
    return _ratio((positive_RN * precision_RN).sum(axis=1), positive_RN.sum(axis=1))


def _area(positive_RN: np.ndarray, negative_RN: np.ndarray, last_N: np.ndarray) -> np.ndarray:
    up_to_RN = negative_RN.cumsum(axis=1)
    total_R = up_to_RN[:, -1]
    first_N = np.searchsorted(last_N, last_N)  # first place with the same score
    above_RN = (up_to_RN - negative_RN)[:, first_N]
    tied_RN = up_to_RN[:, last_N] - above_RN
    won_R = (positive_RN * (total_R[:, None] - above_RN - tied_RN / 2)).sum(axis=1)
    return _ratio(won_R, positive_RN.sum(axis=1) * total_R)


def _ratio(part_R: np.ndarray, whole_R: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.where(whole_R > 0, part_R / np.maximum(whole_R, 1e-12), np.nan)
    return ratio
