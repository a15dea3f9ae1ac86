"""HDF5 files of point clouds, many in each, as ModelNet40 and ScanObjectNN are distributed.

A file has `data` [clouds, points, 3] and `label` [clouds] or [clouds, 1], whole numbers from 0, and
may have `normal` like `data`. Labels are read first; clouds are read whole, file by file, when the
first one of a file is wanted, because most files are compressed in large pieces.
"""

from __future__ import annotations

import io
import os
from functools import cached_property, partial
from typing import Any

import numpy as np

from pipeline.data.index import SplitName
from pipeline.data.names import class_names
from pipeline.data.quoting import listing, shortened
from pipeline.data.sources import Source, SourceSample, stamp_of
from pipeline.data.urls import expand, is_url
from pipeline.errors import DataError
from pipeline.specs import Hdf5Data

_MOST_CLASSES = 65536
_EXPECTED = "expected `data` [clouds, points, 3] and `label` [clouds], as in ModelNet40's files"


def hdf5_source(data: Hdf5Data) -> Source:
    """The clouds of HDF5 files. Raises DataError that names the file."""
    splits: dict[SplitName, Any] = {"train": data.train, "val": data.val, "test": data.test}
    files = {
        split: [_File(path) for path in expand(paths, "file", "HDF5")]
        for split, paths in splits.items()
        if paths is not None
    }
    _check_used_once([file for each in files.values() for file in each])
    names = class_names(data.classes) if data.classes is not None else None
    count = _MOST_CLASSES if names is None else len(names)
    labelled = {
        split: [file.sample(row, count) for file in each for row in range(len(file.labels))]
        for split, each in files.items()
    }
    if names is None:
        largest = max(file.labels.max() for each in files.values() for file in each)
        names = [str(number) for number in range(int(largest) + 1)]
    return Source(names, labelled)


def _check_used_once(files: list[_File]) -> None:
    paths = [file.path for file in files]
    for path in paths:
        if paths.count(path) > 1:
            raise DataError(f"{path}: given in two splits; the splits must not share samples")


class _File:
    """An HDF5 file: its labels, and its clouds when they are asked for.

    Raises DataError that names it.
    """

    def __init__(self, path: str) -> None:
        if is_url(path):
            raise DataError(f"{path}: HDF5 files are read from disk only; download it first")
        self.path = path
        try:
            self._stamp = stamp_of(os.stat(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
        with self._opened() as file:
            self._names = [name for name in ("data", "normal") if name in file]
            self._check_shapes(file)
            self.labels = self._read(file, "label").reshape(-1)
        if self.labels.dtype.kind not in "iu" or self.labels.min() < 0:
            raise DataError(
                f"{path}: `label` holds {self.labels.dtype} from {self.labels.min()} on; expected"
                " whole numbers from 0"
            )

    def sample(self, row: int, classes: int) -> SourceSample:
        """One cloud. Raises DataError if its label is none of the classes."""
        name, label = f"{self.path}: cloud {row}", int(self.labels[row])
        if label >= classes:
            raise DataError(
                f"{name}: label {label} is outside the {classes:,} classes; expected 0 to"
                f" {classes - 1:,}"
            )
        return SourceSample(name, self._stamp, label, partial(self._content, row))

    def _content(self, row: int) -> bytes:
        stream = io.BytesIO()
        np.save(stream, self._clouds[row], allow_pickle=False)
        return stream.getvalue()

    @cached_property
    def _clouds(self) -> np.ndarray:
        """All clouds, [clouds, points, 3 or 6]."""
        with self._opened() as file:
            return np.concatenate([self._read(file, name) for name in self._names], axis=-1)

    def _opened(self) -> Any:
        try:
            import h5py
        except ImportError:
            raise DataError(
                f"{self.path}: reading HDF5 needs the package h5py; pip install 'taskpack[hdf5]'"
            ) from None
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise DataError(
                f"{self.path}: not a whole HDF5 file ({shortened(str(error), 100)}); copy it again"
            ) from None

    def _check_shapes(self, file: Any) -> None:
        import h5py

        for name in {*self._names, "data", "label"}:
            # A link could lead to another file.
            if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(
                file[name], h5py.Dataset
            ):
                raise DataError(f"{self.path}: holds {listing(sorted(file))}; {_EXPECTED}")
        shapes = {name: file[name].shape for name in (*self._names, "label")}
        clouds = shapes["data"]
        fits = len(clouds) == 3 and clouds[2] == 3 and clouds[0] > 0
        if (
            not fits
            or shapes.get("normal", clouds) != clouds
            or shapes["label"] not in ((clouds[0],), (clouds[0], 1))
        ):
            raise DataError(
                f"{self.path}: has"
                f" {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())};"
                f" {_EXPECTED}"
            )

    def _read(self, file: Any, name: str) -> np.ndarray:
        try:
            array: np.ndarray = file[name][()]
        except OSError as error:
            raise DataError(
                f"{self.path}: `{name}` cannot be read ({shortened(str(error), 100)}); copy it"
                " again"
            ) from None
        return array
