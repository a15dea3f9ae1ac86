"""What datasets are made from: sources of labelled images, of which image folders and
scikit-learn's digits are here.

A source knows its classes and lists its samples; images are read one at a time, when they are
written to shards. Each sample has a stamp that changes when the sample does (see `stamp_of`), so a
source can be compared with an existing dataset without reading the images.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.faults import Faults
from pipeline.data.folders import labelled_files
from pipeline.data.images import Images
from pipeline.data.index import SplitName
from pipeline.data.modality import Modality
from pipeline.data.names import check_names, numbered
from pipeline.data.quoting import listing
from pipeline.data.splits import choose_by_class, class_quotas
from pipeline.errors import DataError
from pipeline.kinds import Label, TaskKind, classes_in
from pipeline.specs import DigitsData, FolderData


@dataclass(frozen=True)
class SourceSample:
    """One labelled image that is not read yet: `load` returns its encoded bytes, `name` is its name
    in error messages.

    `mask` returns the image's mask as a PNG of class numbers, from the image's bytes; None where
    the label is all there is. With a mask, the label is the mask's classes, known when it is read.
    """

    name: str
    stamp: str
    label: Label
    load: Callable[[], bytes]
    mask: Callable[[bytes], bytes] | None = None


@dataclass(frozen=True)
class Source:
    """The classes and samples of a dataset."""

    classes: list[str]
    splits: dict[SplitName, list[SourceSample]]

    def labelled_as(self, kind: TaskKind) -> Source:
        """The same with labels of a kind, where each sample has one class."""
        splits = {
            split: [
                replace(sample, label=kind.label(classes_in(sample.label))) for sample in samples
            ]
            for split, samples in self.splits.items()
        }
        return Source(self.classes, splits)

    def digest(self, description: str) -> str:
        """SHA-256 (hex) over `description`, classes, and every sample's name, stamp and label."""
        digest = hashlib.sha256(f"{description}\n{self.classes!r}\n".encode())
        for split, samples in self.splits.items():
            for sample in samples:
                digest.update(f"{split} {sample.name!r} {sample.stamp} {sample.label}\n".encode())
        return digest.hexdigest()


def _file_sample(path: Path, label: int) -> SourceSample:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return SourceSample(str(path), stamp_of(status), label, partial(read_file, path))


def stamp_of(status: os.stat_result) -> str:
    """A stamp that changes when a file does: `cp -p` and `rsync` keep size and modification
    time.
    """
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"


def read_file(path: Path) -> bytes:
    """The content of a local file. Raises DataError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def number_names(names: Mapping[SplitName, Sequence[str]], what: str) -> dict[str, int]:
    """Number the names of classes that occur in train, in sorted order. Raises DataError if another
    split has one that train lacks.
    """
    number = numbered(sorted(set(names["train"])))
    check_names(sorted({name for each in names.values() for name in each}), what)
    for split, each in names.items():
        unknown = sorted(set(each) - number.keys())
        if unknown:
            raise DataError(
                f"{split} has {what} that train lacks: {listing(unknown)}; every class needs"
                " training samples"
            )
    return number


def _number_classes(
    labelled: dict[SplitName, list[tuple[Path, str]]], what: str, noun: str
) -> Source:
    """Samples with their classes as numbers. Raises DataError like `number_names`, or if an image
    is listed twice.
    """
    check_used_once(labelled, noun)
    number = number_names(
        {split: [name for _, name in samples] for split, samples in labelled.items()}, what
    )
    return Source(
        list(number),
        {
            split: [_file_sample(path, number[name]) for path, name in samples]
            for split, samples in labelled.items()
        },
    )


def check_used_once(
    used: Mapping[SplitName, Sequence[tuple[Path, object]]], noun: str = "image"
) -> None:
    """Raise DataError if a sample, which is called `noun`, is given twice."""
    first_use: dict[Path, str] = {}
    for split, samples in used.items():
        for path, _ in samples:
            if path in first_use:
                raise DataError(
                    f"{path}: given in {split}, and before that in {first_use[path]}; give each"
                    f" {noun} once"
                )
            first_use[path] = split


# --- image folders --------------------------------------------------------------------------------


def folder_source(data: FolderData, modality: type[Modality] = Images) -> Source:
    """One folder per class in the folder of each split; classes are the names of train's folders,
    sorted. Raises DataError.
    """
    faults = Faults(f"{modality.noun}s")
    folders: dict[SplitName, str | None] = {"train": data.train, "val": data.val, "test": data.test}
    labelled = {
        split: labelled_files(Path(folder), faults, modality)
        for split, folder in folders.items()
        if folder is not None
    }
    faults.check()
    return _number_classes(labelled, "class folders", modality.noun)


# --- scikit-learn's digits ------------------------------------------------------------------------


def digits_source(data: DigitsData) -> Source:
    """Train and test drawn from scikit-learn's 1,797 digits, stratified, by a seed. Raises
    DataError if there are too few.
    """
    from sklearn.datasets import load_digits  # slow to import, and only wanted here

    digits, labels = load_digits(return_X_y=True)
    if data.train_samples + data.test_samples > len(labels):
        asked = f"{data.train_samples} + {data.test_samples}"
        raise DataError(
            f"digits: {asked} samples asked for, there are {len(labels)}; lower train_samples or"
            " test_samples"
        )
    rng = np.random.default_rng(data.seed)
    test = choose_by_class(labels, class_quotas(np.bincount(labels), data.test_samples), rng)
    others = np.flatnonzero(~test)
    chosen = choose_by_class(
        labels[others], class_quotas(np.bincount(labels[others]), data.train_samples), rng
    )
    images = np.rint(digits.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)

    def sample(row: int) -> SourceSample:
        return SourceSample(f"digit {row}", "", int(labels[row]), partial(encode_png, images[row]))

    return Source(
        [str(digit) for digit in range(10)],
        {
            "train": [sample(row) for row in others[chosen].tolist()],
            "test": [sample(row) for row in np.flatnonzero(test).tolist()],
        },
    )


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 [H, W] or [H, W, 3]."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
