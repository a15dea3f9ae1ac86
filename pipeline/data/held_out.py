"""A test set held out of train, for data without one.

The images of each class are ordered by a hash of their paths below the folder that all of train
shares, and the first ones become the test set. So it is the same on every machine and for every
seed of a task, and an image rarely changes sides when others are added: what a model was trained on
must not become what a later one is tested on.
"""

from __future__ import annotations

import os

import numpy as np

from pipeline.data.index import SplitName
from pipeline.data.sources import Source, SourceSample
from pipeline.data.splits import held_out_by_labels, held_out_quotas, label_array
from pipeline.data.urls import sha256_hex


def hold_out_test(source: Source, fraction: float) -> Source:
    """`source` with about `fraction` of the training images of each class as its test set.

    Raises DataError if a class has a single image.
    """
    train = source.splits["train"]
    names = [sample.name for sample in train]  # paths or URLs
    shared = len(os.path.commonprefix(names).rpartition("/")[0])  # noqa: RUF071
    by_hash = sorted(train, key=lambda sample: sha256_hex(os.fsencode(sample.name[shared:])))
    labels = label_array([sample.label for sample in by_hash])
    if labels.dtype == object:
        is_test_N = held_out_by_labels(
            labels, fraction, np.arange(len(labels)), len(source.classes)
        )
    else:
        is_test_N = _first_of_each_class(
            labels, held_out_quotas(labels, fraction, source.classes, "test")
        )
    splits: dict[SplitName, list[SourceSample]] = {
        "train": [
            sample for sample, is_test in zip(by_hash, is_test_N, strict=True) if not is_test
        ],
        "test": [sample for sample, is_test in zip(by_hash, is_test_N, strict=True) if is_test],
    }
    return Source(source.classes, {**source.splits, **splits})


def _first_of_each_class(labels: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    taken = np.zeros_like(quotas)
    is_first = np.zeros(len(labels), bool)
    for number, label in enumerate(labels):
        is_first[number] = taken[label] < quotas[label]
        taken[label] += 1
    return is_first
