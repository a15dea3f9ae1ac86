"""List files and JSON splits: datasets that name their images by path and their classes by number.

VTAB-1k (arXiv 1910.04867) as it is passed around is a folder a task, with list files of `path label` lines; the FGVC splits of VPT (arXiv 2203.12119)
are JSON objects of `{"path": label}`. How many classes there are is declared with the task, because train need not have them all: VTAB-1k's 800
training images are not stratified.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.index import SplitName
from pipeline.data.sources import Source, SourceSample, class_names, read_file, stamp_of
from pipeline.errors import DataError
from pipeline.spec import JsonData, ListsData

_DIGITS_MAX = 9  # longer runs of digits are no label


class _Entry(NamedTuple):
    """One image as it was listed; `where` names file and line or key."""

    where: str
    path: str
    label: int


def lists_source(data: ListsData) -> Source:
    """List files whose labels are the classes' numbers, from 0. Raises DataError that names file and line."""
    names = _names(data)
    listed = {split: _list_entries(path) for split, path in _split_files(data)}
    for entries in listed.values():
        for entry in entries:
            if entry.label >= len(names):
                raise DataError(f"{entry.where}: label {entry.label} is outside the {len(names)} classes; expected 0 to {len(names) - 1}")
    return Source(names, {split: _samples(entries) for split, entries in _each_once(listed, data, data.repeats).items()})


def json_source(data: JsonData) -> Source:
    """JSON objects of path to label. Labels below the number of classes are the classes' numbers. Others are numbered in their order, as VPT does,
    and must be as many as the classes. Raises DataError that names file and key.
    """
    names = _names(data)
    listed = {split: _json_entries(path) for split, path in _split_files(data)}
    labels = sorted({entry.label for entries in listed.values() for entry in entries})
    if labels[-1] >= len(names):
        _check_count(listed, labels, len(names))
        names = [str(label) for label in labels] if isinstance(data.classes, int) else names
        number = {label: index for index, label in enumerate(labels)}
        listed = {split: [entry._replace(label=number[entry.label]) for entry in entries] for split, entries in listed.items()}
    return Source(names, {split: _samples(entries) for split, entries in _each_once(listed, data).items()})


def _check_count(listed: dict[SplitName, list[_Entry]], labels: list[int], classes: int) -> None:
    if len(labels) == classes:
        return
    largest = next(entry for entries in listed.values() for entry in entries if entry.label == labels[-1])
    raise DataError(
        f"{largest.where}: label {largest.label} is outside the {classes} classes; expected 0 to {classes - 1}, "
        f"or {classes} different labels in all splits together (there are {len(labels)})"
    )


def _names(data: ListsData | JsonData) -> list[str]:
    return [str(number) for number in range(data.classes)] if isinstance(data.classes, int) else class_names(data.classes)


def _split_files(data: ListsData | JsonData) -> Iterator[tuple[SplitName, Path]]:
    root = Path(data.root)
    yield "train", root / data.train
    if data.val is not None:
        yield "val", root / data.val
    yield "test", root / data.test


def _text(file: Path) -> str:
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected the names of a split's images with their labels; check `root` in the task's data section")
    try:
        return read_file(file).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8 text; expected the names of a split's images with their labels") from None


def _list_entries(file: Path) -> list[_Entry]:
    entries = []
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        path, *label = line.strip().rsplit(maxsplit=1)
        if not label:
            raise DataError(f"{where}: {path!r} has no label; expected `path label`")
        if not (label[0].isascii() and label[0].isdigit() and len(label[0]) <= _DIGITS_MAX):
            raise DataError(f"{where}: label {label[0]!r} is no number; expected `path label` with labels from 0")
        entries.append(_Entry(where, path, int(label[0])))
    if not entries:
        raise DataError(f"{file}: lists no images; expected lines of `path label`")
    return entries


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its keys as they were written, repeated ones too."""


def _json_entries(file: Path) -> list[_Entry]:
    try:
        content = json.loads(_text(file), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); expected an object of image paths and labels") from None
    if not isinstance(content, _Pairs) or not content:
        found = "an empty object" if isinstance(content, _Pairs) else type(content).__name__
        raise DataError(f'{file}: holds {found}; expected an object of image paths and labels, {{"path.jpg": 0, ...}}')
    for path, label in content:
        if type(label) is not int or label < 0:  # JSON's true is an int to Python
            raise DataError(f"{file}: {path!r}: label {_shortened(label)}; expected a whole number from 0")
    return [_Entry(f"{file}: {path!r}", path, label) for path, label in content]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _each_once(listed: dict[SplitName, list[_Entry]], data: ListsData | JsonData, repeats: bool = False) -> dict[SplitName, list[_Entry]]:
    """The entries with paths made whole. Raises DataError where an image is given twice, unless in one list, with one label, and `repeats` allows."""
    folder = Path(data.root) / data.images
    first_use: dict[str, tuple[SplitName, _Entry]] = {}
    once: dict[SplitName, list[_Entry]] = {split: [] for split in listed}
    for split, entries in listed.items():
        for entry in entries:
            entry = entry._replace(path=os.path.normpath(folder / entry.path))
            use, first = first_use.setdefault(entry.path, (split, entry))
            if first is entry:
                once[split].append(entry)
            elif not (repeats and use == split and first.label == entry.label):
                raise DataError(f"{entry.where}: {entry.path}: given before, at {first.where}; give each image once")
    return once


def _samples(entries: list[_Entry]) -> list[SourceSample]:
    samples = []
    for entry in entries:
        try:
            status = os.stat(entry.path)
        except OSError as error:
            raise DataError(f"{entry.where}: {entry.path}: cannot be read ({error.strerror}); add the image, or remove it from the list") from None
        except ValueError:  # NUL, or half a surrogate pair out of JSON
            raise DataError(f"{entry.where}: {entry.path!r} holds what no path can; expected the path of an image") from None
        samples.append(SourceSample(entry.path, stamp_of(status), entry.label, partial(read_file, Path(entry.path))))
    return samples
