"""What datasets are made from: image folders, CSV manifests, scikit-learn's digits.

A source knows its classes and lists its samples; images are read one at a time, when they are written to shards. Each sample has a stamp that changes
when the sample does (see `stamp_of`), so a source can be compared with an existing dataset without reading the images.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.faults import Faults
from pipeline.data.folders import labelled_images
from pipeline.data.index import SplitName
from pipeline.data.splits import choose_by_class, class_quotas
from pipeline.data.urls import fetch
from pipeline.errors import DataError
from pipeline.spec import CsvData, DigitsData, FolderData


@dataclass(frozen=True)
class SourceSample:
    """One labelled image that is yet to be read: `load` gives its encoded bytes, `name` calls it in errors."""

    name: str
    stamp: str
    label: int
    load: Callable[[], bytes]


@dataclass(frozen=True)
class Source:
    """The classes and samples of a dataset."""

    classes: list[str]
    splits: dict[SplitName, list[SourceSample]]

    def digest(self, description: str) -> str:
        """SHA-256 (hex) over `description`, classes, and every sample's name, stamp and label."""
        digest = hashlib.sha256(f"{description}\n{self.classes!r}\n".encode())
        for split, samples in self.splits.items():
            for sample in samples:
                digest.update(f"{split} {sample.name!r} {sample.stamp} {sample.label}\n".encode())
        return digest.hexdigest()


def _split_paths(train: str, val: str | None, test: str) -> Iterator[tuple[SplitName, Path]]:
    yield "train", Path(train)
    if val is not None:
        yield "val", Path(val)
    yield "test", Path(test)


def _file_sample(path: Path, label: int) -> SourceSample:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return SourceSample(str(path), stamp_of(status), label, partial(read_file, path))


def stamp_of(status: os.stat_result) -> str:
    """What changes when a file does. Its size and time of modification alone stay when tools such as `cp -p` or `rsync` replace it."""
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"


def read_file(path: Path) -> bytes:
    """The content of a local file. Raises DataError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def class_names(classes: tuple[str, ...] | str) -> list[str]:
    """Names as given, or those in a file (or URL) with one name a line. Raises DataError."""
    if not isinstance(classes, str):
        return list(classes)
    try:
        text = fetch(classes).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{classes}: not UTF-8 text; expected one class name a line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _number_classes(labelled: dict[SplitName, list[tuple[Path, str]]], what: str) -> Source:
    """Number the names that occur in train, in sorted order. Raises DataError where another split has a name that train lacks,
    or an image is given twice.
    """
    _check_used_once(labelled)
    classes = sorted({name for _, name in labelled["train"]})
    number = {name: label for label, name in enumerate(classes)}
    for split, samples in labelled.items():
        unknown = sorted({name for _, name in samples} - set(classes))
        if unknown:
            raise DataError(f"{split} has {what} that train lacks: {', '.join(unknown)}; every class needs training samples")
    return Source(classes, {split: [_file_sample(path, number[name]) for path, name in samples] for split, samples in labelled.items()})


def _check_used_once(labelled: dict[SplitName, list[tuple[Path, str]]]) -> None:
    first_use: dict[Path, str] = {}
    for split, samples in labelled.items():
        for path, _ in samples:
            if path in first_use:
                raise DataError(f"{path}: given in {split}, and before that in {first_use[path]}; give each image once")
            first_use[path] = split


# --- image folders --------------------------------------------------------------------------------------------------------------------------


def folder_source(data: FolderData) -> Source:
    """One folder a class, in each split's folder; classes are the names of train's folders, sorted. Raises DataError."""
    faults = Faults()
    labelled = {split: labelled_images(path, faults) for split, path in _split_paths(data.train, data.val, data.test)}
    faults.check()
    return _number_classes(labelled, "class folders")


# --- CSV manifests --------------------------------------------------------------------------------------------------------------------------


def csv_source(data: CsvData) -> Source:
    """Manifests with the columns `path,label`; classes are the labels that occur in train, sorted. Raises DataError."""
    labelled = {split: _manifest_samples(path, data.root) for split, path in _split_paths(data.train, data.val, data.test)}
    return _number_classes(labelled, "labels")


def _manifest_samples(manifest: Path, root: str | None) -> list[tuple[Path, str]]:
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            missing = {"path", "label"} - set(reader.fieldnames or [])
            if missing:
                raise DataError(f"{manifest}: no column {' or '.join(sorted(missing))}; expected a first line `path,label`")
            rows = [(reader.line_num, row["path"], row["label"]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{manifest}: cannot be read ({error}); expected a CSV file in UTF-8 with the columns path,label") from None
    if not rows:
        raise DataError(f"{manifest}: lists no images; expected lines of path,label")
    for line, path, label in rows:
        if not path or not label:
            raise DataError(f"{manifest}: line {line}: path {path!r}, label {label!r}; expected both")
    folder = Path(root) if root is not None else manifest.parent
    return [(Path(os.path.normpath(folder / path)), label) for _, path, label in rows]


# --- scikit-learn's digits ------------------------------------------------------------------------------------------------------------------


def digits_source(data: DigitsData) -> Source:
    """Train and test drawn from scikit-learn's 1,797 digits, stratified, by a seed. Raises DataError where they are too few."""
    from sklearn.datasets import load_digits  # slow to import, and only wanted here

    digits, labels = load_digits(return_X_y=True)
    if data.train_samples + data.test_samples > len(labels):
        asked = f"{data.train_samples} + {data.test_samples}"
        raise DataError(f"digits: {asked} samples asked for, there are {len(labels)}; lower train_samples or test_samples")
    rng = np.random.default_rng(data.seed)
    test = choose_by_class(labels, class_quotas(np.bincount(labels), data.test_samples), rng)
    others = np.flatnonzero(~test)
    chosen = choose_by_class(labels[others], class_quotas(np.bincount(labels[others]), data.train_samples), rng)
    images = np.rint(digits.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)

    def sample(row: int) -> SourceSample:
        return SourceSample(f"digit {row}", "", int(labels[row]), partial(encode_png, images[row]))

    return Source(
        [str(digit) for digit in range(10)],
        {"train": [sample(row) for row in others[chosen].tolist()], "test": [sample(row) for row in np.flatnonzero(test).tolist()]},
    )


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 [H, W] or [H, W, 3]."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
