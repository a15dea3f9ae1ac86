"""List files and JSON splits: datasets that name their images by path and their classes by number.

VTAB-1k (arXiv 1910.04867) is distributed as one folder per task, with list files of `path label`
lines; VPT's splits of FGVC (arXiv 2203.12119) are JSON objects of `{"path": label}`. The number of
classes is declared in the task, because train need not have them all: VTAB-1k's 800 training images
are not stratified.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.data.entries import Entry, listed_samples, located
from pipeline.data.images import Images
from pipeline.data.index import SplitName
from pipeline.data.labels import (
    SINGLE,
    JsonObject,
    check_one_kind,
    read_json,
    sample_label,
    separate_labels,
)
from pipeline.data.modality import Modality
from pipeline.data.names import class_names, numbered
from pipeline.data.quoting import quoted
from pipeline.data.sources import Source
from pipeline.data.text import lines_of, read_text
from pipeline.errors import DataError
from pipeline.kinds import TaskKind, classes_in
from pipeline.specs import JsonData, ListsData


class _Pair(NamedTuple):
    """One key of a JSON file with its label, of any type."""

    where: str
    path: str
    label: Any


def lists_source(
    data: ListsData, kind: TaskKind = SINGLE, modality: type[Modality] = Images
) -> Source:
    """List files whose labels are the classes' numbers, from 0; several as `path 3,7`, none as
    `path []`. Raises DataError that names file and line."""
    names = _names(data)
    listed = {
        split: _list_entries(file, data, kind, modality) for split, file in _split_files(data)
    }
    for entries in listed.values():
        for entry in entries:
            largest = max(classes_in(entry.label), default=-1)
            if largest >= len(names):
                raise DataError(
                    f"{entry.where}: label {largest} is outside the {len(names)} classes; expected"
                    f" 0 to {len(names) - 1}"
                )
    return Source(names, listed_samples(listed, data.repeats, modality))


def json_source(
    data: JsonData, kind: TaskKind = SINGLE, modality: type[Modality] = Images
) -> Source:
    """JSON objects of path to label. Labels that are names, or numbers below the number of classes,
    are those classes.

    Other numbers are numbered in their order, as in VPT, and there must be as many as classes.
    Raises DataError that names file and key.
    """
    names = _names(data)
    pairs = {split: _json_pairs(file, modality) for split, file in _split_files(data)}
    declared = None if isinstance(data.classes, int) else numbered(names)
    listed = {
        split: [
            Entry(
                pair.where,
                _image(pair.path, data),
                sample_label(pair.label, kind, declared, pair.where),
            )
            for pair in each
        ]
        for split, each in pairs.items()
    }
    _check_written([pair for each in pairs.values() for pair in each], kind)
    labels = sorted(
        {
            label
            for entries in listed.values()
            for entry in entries
            for label in classes_in(entry.label)
        }
    )
    if labels and labels[-1] >= len(names):
        _check_count(listed, labels, len(names))
        names = [str(label) for label in labels] if isinstance(data.classes, int) else names
        number = {label: index for index, label in enumerate(labels)}
        listed = {
            split: [
                entry._replace(
                    label=kind.label([number[label] for label in classes_in(entry.label)])
                )
                for entry in entries
            ]
            for split, entries in listed.items()
        }
    return Source(names, listed_samples(listed, modality=modality))


def _check_written(pairs: list[_Pair], kind: TaskKind) -> None:
    """Check that all labels are numbers, or all of them names. Raises DataError."""
    written = [
        (label, pair.where)
        for pair in pairs
        for label in separate_labels(pair.label, kind, pair.where)
    ]
    for label, where in written:
        check_one_kind(label, where, *written[0])


def _check_count(listed: dict[SplitName, list[Entry]], labels: list[int], classes: int) -> None:
    if len(labels) == classes:
        return
    largest = next(
        entry
        for entries in listed.values()
        for entry in entries
        if labels[-1] in classes_in(entry.label)
    )
    raise DataError(
        f"{largest.where}: label {labels[-1]} is outside the {classes} classes; expected 0 to"
        f" {classes - 1}, or {classes} different labels in all splits together (there are"
        f" {len(labels)})"
    )


def _names(data: ListsData | JsonData) -> list[str]:
    return (
        [str(number) for number in range(data.classes)]
        if isinstance(data.classes, int)
        else class_names(data.classes)
    )


def _split_files(data: ListsData | JsonData) -> Iterator[tuple[SplitName, str]]:
    files: dict[SplitName, str | None] = {"train": data.train, "val": data.val, "test": data.test}
    for split, file in files.items():
        if file is not None:
            yield split, located(file, data.root)


def _expected(modality: type[Modality]) -> str:
    return f"the names of a split's {modality.noun}s with their labels"


def _list_entries(
    file: str, data: ListsData, kind: TaskKind, modality: type[Modality]
) -> list[Entry]:
    entries = []
    for number, line in enumerate(lines_of(read_text(file, _expected(modality))), start=1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        path, *label = line.strip().rsplit(maxsplit=1)
        if not label:
            raise DataError(f"{where}: {quoted(path)} has no label; expected `path label`")
        entries.append(Entry(where, _image(path, data), sample_label(label[0], kind, None, where)))
    if not entries:
        raise DataError(f"{file}: lists no {modality.noun}s; expected lines of `path label`")
    return entries


def _image(path: str, data: ListsData | JsonData) -> str:
    return located(path, located(data.images, data.root))


def _json_pairs(file: str, modality: type[Modality]) -> list[_Pair]:
    holds = f"an object of {modality.noun} paths and labels"
    content = read_json(read_text(file, _expected(modality)), file, holds)
    if not isinstance(content, JsonObject) or not content:
        found = "an empty object" if isinstance(content, JsonObject) else type(content).__name__
        raise DataError(
            f'{file}: holds {found}; expected {holds}, {{"path.{modality.extensions[0]}": 0, ...}}'
        )
    return [_Pair(f"{file}: {quoted(path)}", path, label) for path, label in content]
