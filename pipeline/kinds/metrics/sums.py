"""Weighted sums by class. Legend: R sets of weights, N samples, C classes."""

from __future__ import annotations

import numpy as np


def sums_by_class(class_N: np.ndarray, weights_RN: np.ndarray, classes: int) -> np.ndarray:
    """The weights of the samples of each class, [R, C]."""
    return np.stack([np.bincount(class_N, each, classes) for each in weights_RN])


def mean_over_classes(values_RC: np.ndarray, is_defined_RC: np.ndarray) -> np.ndarray:
    """Mean over the classes for which a value is defined; 0 where it is for none."""
    total_R = np.where(is_defined_RC, values_RC, 0).sum(axis=1)
    mean: np.ndarray = total_R / np.maximum(is_defined_RC.sum(axis=1), 1)
    return mean
