"""The splits train, validation and test: from the index, or with a stratified validation set held
out of train, once or in folds.

Of a class with n samples, about `val_fraction * n` go to validation: quotas by largest remainder,
at least one sample of each class on both sides, chosen by a seed. If samples may have several
classes, iterative stratification (Sechidis et al. 2011) comes close to that: the rarest class is
dealt first, each sample to the side that lacks its class more. `trainval` is everything except
test, for the final fit. In folds, every sample of train is in the validation set of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.index import DataIndex, ShardEntry, SplitName
from pipeline.data.quoting import listing
from pipeline.errors import DataError
from pipeline.kinds import Label
from pipeline.specs import Task


@dataclass(frozen=True, eq=False)
class Split:
    """A set of samples of some shards.

    samples: int32 [N, 2], rows of (number of the shard in `shards`, position in that shard).
    labels: int64 [N], or tuples of classes as objects [N].
    """

    name: str
    shards: tuple[ShardEntry, ...]
    samples: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)


def split_samples(index: DataIndex, val_fraction: float, seed: int) -> dict[str, Split]:
    """The splits `train`, `val`, `trainval` and `test`. Raises DataError if a class has too few
    samples to hold one out.
    """
    train, test = _whole("train", index, "train"), _whole("test", index, "test")
    if index.splits.get("val"):
        return {
            "train": train,
            "val": _whole("val", index, "val"),
            "trainval": _whole("trainval", index, "train", "val"),
            "test": test,
        }
    held_out = held_out_samples(train.labels, val_fraction, seed, index.classes)
    return {
        "train": _subset("train", train, ~held_out),
        "val": _subset("val", train, held_out),
        "trainval": _subset("trainval", train),
        "test": test,
    }


def splits_of(task: Task, index: DataIndex) -> list[dict[str, Split]]:
    """The splits of each fold of a task, as from `split_samples`; one without `folds`. Raises
    DataError if train cannot be divided.
    """
    if task.folds == 1:
        return [split_samples(index, task.val_fraction, task.seed)]
    if index.splits.get("val"):
        raise DataError(
            f"{task.name}: folds: given {task.folds}, but the data has its own validation split;"
            " leave out one or the other"
        )
    train, test = _whole("train", index, "train"), _whole("test", index, "test")
    fold_N = _dealt_folds(train.labels, task.folds, task.seed, index.classes)
    return [
        {
            "train": _subset("train", train, fold_N != fold),
            "val": _subset("val", train, fold_N == fold),
            "trainval": _subset("trainval", train),
            "test": test,
        }
        for fold in range(task.folds)
    ]


def _dealt_folds(labels: np.ndarray, folds: int, seed: int, classes: list[str]) -> np.ndarray:
    """The fold of each sample, int [N]: folds of equal size, and of equal numbers of each class, to
    within one.

    Samples that may have several classes are held out fold by fold, which comes close to that.
    """
    rng, fold_N = np.random.default_rng([seed, 1]), np.zeros(len(labels), np.int64)
    if labels.dtype == object:
        left = np.arange(len(labels))
        for fold in range(folds - 1):
            order = rng.permutation(len(left))
            held_out = held_out_by_labels(labels[left], 1 / (folds - fold), order, len(classes))
            left = left[~held_out]
            fold_N[left] = fold + 1
        return fold_N
    counts = np.bincount(labels, minlength=len(classes))
    smallest = min(np.flatnonzero(counts), key=lambda number: counts[number])
    if counts[smallest] < folds:
        raise DataError(
            f"folds: given {folds}, but {classes[smallest]!r} has {counts[smallest]} training"
            f" samples: give at most {counts[smallest]}, so that each fold has one, or add samples"
        )
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    fold_N[by_class] = np.arange(len(labels)) % folds
    return fold_N


def _whole(name: str, index: DataIndex, *parts: SplitName) -> Split:
    shards = tuple(shard for part in parts for shard in index.splits.get(part, []))
    rows = [
        np.stack([np.full(shard.samples, number), np.arange(shard.samples)], axis=1)
        for number, shard in enumerate(shards)
    ]
    samples = np.concatenate(rows).astype(np.int32) if rows else np.zeros((0, 2), np.int32)
    return Split(
        name, shards, samples, label_array([label for shard in shards for label in shard.labels])
    )


def label_array(labels: Sequence[Label]) -> np.ndarray:
    """Labels as `Split` has them."""
    if all(isinstance(label, int) for label in labels):
        return np.array(labels, np.int64)
    tuples = np.empty(len(labels), object)
    tuples[:] = labels
    return tuples


def _subset(name: str, split: Split, chosen: np.ndarray | slice = slice(None)) -> Split:
    return Split(name, split.shards, split.samples[chosen], split.labels[chosen])


def held_out_samples(
    labels: np.ndarray, fraction: float, seed: int, classes: list[str]
) -> np.ndarray:
    """Which of the samples with `labels` to hold out, as bool [N].

    Raises DataError if samples have one class each, and a class has a single sample.
    """
    if labels.dtype == object:
        order = np.random.default_rng([seed, 0]).permutation(len(labels))
        return held_out_by_labels(labels, fraction, order, len(classes))
    return choose_by_class(
        labels, held_out_quotas(labels, fraction, classes, "val"), np.random.default_rng([seed, 0])
    )


def held_out_quotas(
    labels: np.ndarray, fraction: float, classes: list[str], split: SplitName
) -> np.ndarray:
    """How many samples of each class to hold out for `split`, int [C].

    Raises DataError if a class has a single sample.
    """
    counts = np.bincount(labels, minlength=len(classes))
    single = [classes[number] for number in np.flatnonzero(counts == 1)]
    if single:
        what = {"val": "validation"}.get(split, split)
        raise DataError(
            f"only one training sample of {listing(single)}: a {what} set cannot be held out; add"
            f" samples, or give a {split} split"
        )
    quotas = class_quotas(counts, round(fraction * len(labels)))
    return np.clip(quotas, np.minimum(counts, 1), np.maximum(counts - 1, 0))


def held_out_by_labels(
    labels: np.ndarray, fraction: float, order: np.ndarray, class_count: int
) -> np.ndarray:
    """Which samples to hold out, bool [N], by iterative stratification.

    Args:
        labels: tuples of classes [N].
        order: in which samples of a class are dealt, a permutation of N.
    """
    has_NC = np.zeros((len(labels), class_count), bool)
    for number, label in enumerate(labels):
        has_NC[number, list(label)] = True
    counts_C = has_NC.sum(axis=0)
    # what training and validation lack of each class, and of samples; a class's only sample is
    # trained on
    held_C = np.clip(
        fraction * counts_C, np.minimum(np.maximum(counts_C - 1, 0), 1), np.maximum(counts_C - 1, 0)
    )
    lacks_2C, lacks_2 = (
        np.stack([counts_C - held_C, held_C]),
        np.array([1 - fraction, fraction]) * len(labels),
    )
    is_dealt_N, held_out_N = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    left_C = counts_C.copy()
    while not is_dealt_N.all():
        rarest = np.where(left_C > 0, left_C, len(labels) + 1).argmin() if left_C.any() else None
        for number in order[(~is_dealt_N & (True if rarest is None else has_NC[:, rarest]))[order]]:
            wants_2 = lacks_2 if rarest is None else lacks_2C[:, rarest]
            side = int(
                wants_2[1] > wants_2[0] or (wants_2[1] == wants_2[0] and lacks_2[1] > lacks_2[0])
            )
            held_out_N[number], is_dealt_N[number] = side, True
            lacks_2C[side, has_NC[number]] -= 1
            lacks_2[side] -= 1
            left_C -= has_NC[number]
    return held_out_N


def class_quotas(counts: np.ndarray, total: int) -> np.ndarray:
    """How many samples to take of each class so that `total` are shared out in proportion to
    `counts` (int [C]): largest remainder, int [C].
    """
    shares = counts * (total / max(1, counts.sum()))
    quotas = np.floor(shares).astype(np.int64)
    neediest = np.argsort(quotas - shares, kind="stable")
    quotas[neediest[: total - quotas.sum()]] += 1
    return quotas


def choose_by_class(labels: np.ndarray, quotas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose `quotas[c]` of the samples with label c at random, as bool [N]."""
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    first_of_class = np.searchsorted(labels[by_class], labels[by_class], side="left")
    chosen = np.zeros(len(labels), bool)
    chosen[by_class[np.arange(len(labels)) - first_of_class < quotas[labels[by_class]]]] = True
    return chosen
