"""CSV manifests: tables with a column of images and a column of labels.

Columns are separated by commas, semicolons, tabs or vertical bars: the one that gives the header
both columns. Every record is read strictly: an unclosed quote would otherwise silently swallow the
rows after it.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.data.entries import Entry, listed_samples, located
from pipeline.data.images import Images
from pipeline.data.index import SplitName
from pipeline.data.labels import SINGLE, kind_label
from pipeline.data.modality import Modality
from pipeline.data.quoting import listing, quoted, shortened
from pipeline.data.sources import Source, number_names
from pipeline.data.text import lines_of, read_text
from pipeline.errors import DataError
from pipeline.kinds import TaskKind
from pipeline.specs import CsvData

_SEPARATORS = (",", ";", "\t", "|")
_HEADER_MAX = 100_000  # below what the csv module takes for a field


class Row(NamedTuple):
    """A path, located, and what the column of labels says of it; `where` names file and line."""

    where: str
    path: str
    labels: list[str]


class _Record(NamedTuple):
    where: str
    fields: list[str]


def csv_source(data: CsvData, kind: TaskKind = SINGLE, modality: type[Modality] = Images) -> Source:
    """Manifests with a column of paths and one of labels; classes are the labels that occur in
    train, sorted.

    Where samples may have several labels, `label_separator` stands between them.

    Raises DataError that names file and line.
    """
    manifests: dict[SplitName, str | None] = {
        "train": data.train,
        "val": data.val,
        "test": data.test,
    }
    rows = {
        split: manifest_rows(manifest, data, kind, modality)
        for split, manifest in manifests.items()
        if manifest is not None
    }
    number = number_names(
        {split: [label for row in found for label in row.labels] for split, found in rows.items()},
        "labels",
    )
    listed = {
        split: [
            Entry(
                row.where,
                row.path,
                kind_label([number[label] for label in row.labels], kind, row.where),
            )
            for row in found
        ]
        for split, found in rows.items()
    }
    return Source(list(number), listed_samples(listed, modality=modality))


def manifest_rows(
    manifest: str, data: CsvData, kind: TaskKind = SINGLE, modality: type[Modality] = Images
) -> list[Row]:
    """The path and the labels of each row. Raises DataError that names file and line."""
    columns = data.path_column, data.label_column
    text = read_text(manifest, f"a CSV file with the columns {' and '.join(columns)}")
    records = _records(text, _separator(text, manifest, columns), manifest)
    header = next(records).fields
    if not _has(header, columns):
        raise DataError(
            f"{manifest}: a column name continues after the first line; is a quote left open?"
        )
    root = data.root if data.root is not None else os.path.dirname(manifest)
    separator = data.label_separator if kind.several_labels else None
    rows = [_row(record, header, columns, root, separator) for record in records]
    if not rows:
        raise DataError(
            f"{manifest}: lists no {modality.noun}s; expected lines with the columns"
            f" {' and '.join(columns)}"
        )
    return rows


def _separator(text: str, manifest: str, columns: tuple[str, str]) -> str:
    """The delimiter that gives the first line both columns. Raises DataError if there is none."""
    first = next((line for line in lines_of(text) if line.strip()), "")[:_HEADER_MAX]
    if not first:
        raise DataError(
            f"{manifest}: the file is empty; expected the columns {' and '.join(columns)}"
        )
    headers = {
        separator: _fields(
            next(csv.reader([first], delimiter=separator, skipinitialspace=True), [])
        )
        for separator in _SEPARATORS
    }
    for separator, header in headers.items():
        if _has(header, columns):
            return separator
    header = max(headers.values(), key=len)
    missing = [column for column in columns if column not in header]
    fault = (
        f"no column {' or '.join(missing)}" if missing else f"a column {' or '.join(columns)} twice"
    )
    raise DataError(
        f"{manifest}: {fault} in its first line ({listing(header)}); name the columns in"
        " `path_column` and `label_column`"
    )


def _has(header: list[str], columns: tuple[str, str]) -> bool:
    return all(header.count(column) == 1 for column in columns)


def _fields(record: list[str]) -> list[str]:
    return [field.strip() for field in record]


def _records(text: str, separator: str, manifest: str) -> Iterator[_Record]:
    """The records that are not blank, each with the number of its first line. Raises DataError."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    where = f"{manifest}: line 1"
    try:
        for record in reader:
            if any(fields := _fields(record)):
                yield _Record(where, fields)
            where = f"{manifest}: line {reader.line_num + 1}"
    except csv.Error as error:
        fault = (
            "a quote is opened and never closed"
            if "unexpected end" in str(error)
            else shortened(str(error), 100)
        )
        raise DataError(
            f'{where}: {fault}; expected fields without quotes, or between two "'
        ) from None


def _row(
    record: _Record,
    header: list[str],
    columns: tuple[str, str],
    root: str,
    label_separator: str | None,
) -> Row:
    where, fields = record
    if any(fields[len(header) :]):
        raise DataError(
            f"{where}: {len(fields)} fields, but the first line has {len(header)}; put fields that"
            " hold the separator in quotes"
        )
    path, label = (
        fields[index] if (index := header.index(column)) < len(fields) else "" for column in columns
    )
    if not path or not (label or label_separator):
        raise DataError(
            f"{where}: {columns[0]} {quoted(path)}, {columns[1]} {quoted(label)}; expected both"
        )
    if len(lines_of(path + label)) > 1:
        raise DataError(
            f"{where}: {columns[0]} {quoted(path)}, {columns[1]} {quoted(label)}: a field continues"
            " in the next line; is a quote left open?"
        )
    return Row(where, located(path, root), _separated(label, label_separator, where))


def _separated(field: str, separator: str | None, where: str) -> list[str]:
    """The labels in a field; none where it is empty, which only a multi-label table allows."""
    labels = [label.strip() for label in field.split(separator)] if separator and field else [field]
    if not all(labels) and field:
        raise DataError(
            f"{where}: the labels {quoted(field)} hold an empty one; write one {separator} between"
            " two labels"
        )
    return labels if field else []
