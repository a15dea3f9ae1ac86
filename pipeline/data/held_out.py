"""A test set held out of train, for data without one.

The images of each class are ordered by a hash of their paths below the folder that all of train
shares, and the first ones become the test set. So it is the same on every machine and for every seed
of a task, and an image rarely changes sides when others are added: what a model was trained on must
not become what a later one is tested on.
"""

from __future__ import annotations

import os
from collections import Counter

import numpy as np

from pipeline.data.sources import Source, SourceSample
from pipeline.data.splits import held_out_quotas
from pipeline.data.urls import sha256_hex


def hold_out_test(source: Source, fraction: float) -> Source:
    """`source` with about `fraction` of the training images of each class as its test set.

    Raises DataError if a class has a single image.
    """
    train = source.splits["train"]
    quotas = held_out_quotas(np.array([sample.label for sample in train]), fraction, source.classes, "test")
    shared = len(os.path.commonprefix([sample.name for sample in train]).rpartition("/")[0])  # names may be URLs  # noqa: RUF071
    taken: Counter[int] = Counter()
    kept: list[SourceSample] = []
    test: list[SourceSample] = []
    for sample in sorted(train, key=lambda sample: sha256_hex(os.fsencode(sample.name[shared:]))):
        is_test = taken[sample.label] < quotas[sample.label]
        taken[sample.label] += is_test
        (test if is_test else kept).append(sample)
    return Source(source.classes, {**source.splits, "train": kept, "test": test})
