"""How well predicted masks overlap the true ones.

    mIoU          |P T| / |P u T| of each class over all images, from one confusion matrix; mean
                  over classes
    boundary_IoU  the same of boundary bands, 2 pixels wide (arXiv 2103.16562)
    mIoU_image    |P T| / |P u T| of each image; mean over images
    mDice         2 |P T| / (|P| + |T|) of each image; mean over images

The last two are those of medical images: class 0 is the background, which they leave out, and an
image's value is the mean over the other classes that its true or predicted mask has; 1 where
neither has any. The first two count every class, and leave out those in neither mask of any image.

Legend: R sets of weights, N images, C classes.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.kinds.mask_counts import (
    ACTUAL,
    BAND_ACTUAL,
    BAND_HITS,
    BAND_PREDICTED,
    HITS,
    PREDICTED,
)
from pipeline.kinds.metrics.registry import metric
from pipeline.kinds.metrics.sums import mean_over_classes
from pipeline.kinds.protocol import Outcomes

KIND = "segmentation"


def _iou_of_classes(outcomes: Outcomes) -> np.ndarray:
    return _ratios_of_sums(outcomes, HITS, PREDICTED, ACTUAL)


def _boundary_iou_of_classes(outcomes: Outcomes) -> np.ndarray:
    return _ratios_of_sums(outcomes, BAND_HITS, BAND_PREDICTED, BAND_ACTUAL)


def _dice_of_classes(outcomes: Outcomes) -> np.ndarray:
    hits_NC, total_NC = _of_foreground(outcomes)
    return _mean_over_images(2 * hits_NC, total_NC)


def _image_iou_of_classes(outcomes: Outcomes) -> np.ndarray:
    hits_NC, total_NC = _of_foreground(outcomes)
    return _mean_over_images(hits_NC, total_NC - hits_NC)


@metric("mIoU", KIND, is_mean_over_classes=True, by_class=_iou_of_classes)
def mean_iou(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Of the pixels of all images."""
    return _iou_of_sums(outcomes, weights_RN, HITS, PREDICTED, ACTUAL)


@metric("boundary_IoU", KIND, is_mean_over_classes=True, by_class=_boundary_iou_of_classes)
def boundary_iou(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Of the boundary bands of all images."""
    return _iou_of_sums(outcomes, weights_RN, BAND_HITS, BAND_PREDICTED, BAND_ACTUAL)


def _error_of_dice(outcomes: Outcomes) -> float:
    return _error_of_mean(_dice_of_images(outcomes))


def _error_of_iou(outcomes: Outcomes) -> float:
    return _error_of_mean(_iou_of_images(outcomes))


@metric("mDice", KIND, exact_error=_error_of_dice, by_class=_dice_of_classes)
def mean_dice(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Of each image."""
    return _mean_of_images(_dice_of_images(outcomes), weights_RN)


@metric("mIoU_image", KIND, exact_error=_error_of_iou, by_class=_image_iou_of_classes)
def mean_iou_of_images(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Of each image."""
    return _mean_of_images(_iou_of_images(outcomes), weights_RN)


def _iou_of_sums(
    outcomes: Outcomes, weights_RN: np.ndarray, hits: int, predicted: int, actual: int
) -> np.ndarray:
    hits_RC, union_RC = _sums(outcomes, weights_RN, hits, predicted, actual)
    return mean_over_classes(hits_RC / np.maximum(union_RC, 1e-12), union_RC > 0)


def _ratios_of_sums(outcomes: Outcomes, hits: int, predicted: int, actual: int) -> np.ndarray:
    """Intersection over union of each class over all images, [C]; NaN for one in no mask."""
    hits_RC, union_RC = _sums(outcomes, np.ones((1, len(outcomes))), hits, predicted, actual)
    ratio: np.ndarray = (hits_RC / np.where(union_RC > 0, union_RC, np.nan))[0]
    return ratio


def _mean_over_images(part_NC: np.ndarray, whole_NC: np.ndarray) -> np.ndarray:
    """Mean ratio of each class over the images that have it, [C]; NaN for one that none has, and
    for the background, which both arguments leave out.
    """
    occurs_NC = whole_NC > 0
    total_C = np.where(occurs_NC, part_NC / np.maximum(whole_NC, 1e-12), 0).sum(axis=0)
    images_C = occurs_NC.sum(axis=0)
    return np.concatenate([[np.nan], total_C / np.where(images_C > 0, images_C, np.nan)])


def _sums(
    outcomes: Outcomes, weights_RN: np.ndarray, hits: int, predicted: int, actual: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted pixels of intersection and of union, [R, C]."""
    hits_RC, predicted_RC, actual_RC = (
        weights_RN @ counts_NC.astype(np.float64)
        for counts_NC in (
            outcomes.outputs[..., hits],
            outcomes.outputs[..., predicted],
            outcomes.targets[..., actual],
        )
    )
    return hits_RC, predicted_RC + actual_RC - hits_RC


def _dice_of_images(outcomes: Outcomes) -> np.ndarray:
    hits_NC, total_NC = _of_foreground(outcomes)
    return _mean_of_occurring(2 * hits_NC, total_NC)


def _iou_of_images(outcomes: Outcomes) -> np.ndarray:
    hits_NC, total_NC = _of_foreground(outcomes)
    return _mean_of_occurring(hits_NC, total_NC - hits_NC)


def _of_foreground(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in both masks, and the sum of both masks' pixels, of all classes but the first."""
    hits_NC = outcomes.outputs[:, 1:, HITS].astype(np.float64)
    predicted_NC = outcomes.outputs[:, 1:, PREDICTED].astype(np.float64)
    return hits_NC, predicted_NC + outcomes.targets[:, 1:, ACTUAL]


def _mean_of_occurring(part_NC: np.ndarray, whole_NC: np.ndarray) -> np.ndarray:
    """Mean ratio of each image [N] over the classes with pixels; 1 where none has any."""
    occurs_NC = whole_NC > 0
    mean_N = mean_over_classes(part_NC / np.maximum(whole_NC, 1e-12), occurs_NC)
    return np.where(occurs_NC.any(axis=1), mean_N, 1.0)


def _mean_of_images(values_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    mean: np.ndarray = weights_RN @ values_N / weights_RN.sum(axis=1)
    return mean


def _error_of_mean(values_N: np.ndarray) -> float:
    return float(values_N.std()) / math.sqrt(len(values_N))
