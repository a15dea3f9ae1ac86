"""The meaning of a label: the number of a class, from 0, or its name if names are declared.

A multi-label sample has any number of them. In `key.cls`, and after the path in a list file, they
are separated by spaces or commas, or are a JSON list, as they are in JSON: `3 7`, `3,7`, `[3, 7]`,
`["wall clock", "lamp"]`. Nothing, or `[]`, is a sample without a label.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.data.names import numbered
from pipeline.data.quoting import listing, quoted, shortened
from pipeline.errors import DataError
from pipeline.kinds import Label, TaskKind, kind_named

_DIGITS_MAX = 18  # longer runs of digits are no label
_SEVERAL = re.compile(r"\[.*\]|[0-9]+([\s,|;]+[0-9]+)+", re.DOTALL)
_ADVICE = "or `kind: multilabel` in the task file"
SINGLE = kind_named("classification")
"""The kind of a task that says nothing else."""


class JsonObject(list[tuple[str, Any]]):
    """A JSON object with its keys as written, including repeated ones."""


def read_json(text: str, where: str, expected: str) -> Any:
    """Parse a JSON text, with objects as JsonObject. Raises DataError naming `where`."""
    try:
        return json.loads(text, object_pairs_hook=JsonObject)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON ({shortened(str(error), 100)}); expected {expected}"
        ) from None


def class_number(label: Any, numbers: Mapping[str, int] | None, where: str) -> int:
    """The class of `label`: an integer (also as text) or a name in `numbers`.

    A number is not compared with the number of classes. Raises DataError naming `where`.
    """
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) <= _DIGITS_MAX:
        return int(label)
    if type(label) is int and 0 <= label < 10**_DIGITS_MAX:  # JSON's true is an int to Python
        return label
    if isinstance(label, str) and numbers is not None and label in numbers:
        return numbers[label]
    expected = "a whole number from 0" + (
        ", or one of the names in `classes`" if numbers is not None else ""
    )
    expected += f", {_ADVICE}" if isinstance(label, str) and _SEVERAL.fullmatch(label) else ""
    raise DataError(f"{where}: the label is {quoted(label)}; expected {expected}")


def sample_label(
    written: Any, kind: TaskKind, numbers: Mapping[str, int] | None, where: str
) -> Label:
    """The label that a text or a JSON value means. Raises DataError naming `where`."""
    classes = [class_number(each, numbers, where) for each in separate_labels(written, kind, where)]
    return kind_label(classes, kind, where)


def kind_label(classes: Sequence[int], kind: TaskKind, where: str) -> Label:
    """The label of a sample with these classes. Raises DataError where the kind has none such."""
    try:
        return kind.label(classes)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def separate_labels(written: Any, kind: TaskKind, where: str) -> list[Any]:
    """The labels in a text or a JSON value; one, unless the kind has several.

    Raises DataError where there are several, and the kind has one.
    """
    is_list = isinstance(written, list) and not isinstance(written, JsonObject)
    if not kind.several_labels:
        if is_list:
            raise DataError(
                f"{where}: the label is {quoted(written)}; expected one class, {_ADVICE}"
            )
        return [written]
    if isinstance(written, str) and written.startswith("["):
        written = read_json(written, where, "a list of labels")
        is_list = isinstance(written, list)
    if isinstance(written, str):
        return [each for each in re.split(r"[\s,]+", written) if each]
    return list(written) if is_list else [written]


def is_name(label: Any) -> bool:
    """Whether a label can only be a name."""
    return isinstance(label, str) and not label.isdigit()


class MemberLabels:
    """Reads the labels of a shard's samples: all are numbers, or all are names from `names`."""

    def __init__(self, names: Sequence[str] | None, kind: TaskKind) -> None:
        self._kind = kind
        self._numbers = None if names is None else numbered(names)
        self._first: tuple[Any, str] | None = None

    def read(self, content: bytes, field: str | None, where: str) -> Label:
        """The label in `key.cls`, or in the field of `key.json`. Raises DataError."""
        try:
            text = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8 text; expected a label") from None
        written = text if field is None else _field(text, field, where)
        labels = separate_labels(written, self._kind, where)
        return kind_label([self._class(each, where) for each in labels], self._kind, where)

    def _class(self, label: Any, where: str) -> int:
        number = class_number(label, self._numbers, where)
        classes = number + 1 if self._numbers is None else len(self._numbers)
        if number >= classes:
            raise DataError(
                f"{where}: label {number} is outside the {classes} classes; expected 0 to"
                f" {classes - 1}"
            )
        self._first = self._first or (label, where)
        check_one_kind(label, where, *self._first)
        return number


def check_one_kind(label: Any, where: str, first: Any, first_where: str) -> None:
    """Raise DataError if one label is a number and another a name.

    Numbers that count from 1 would be mistaken for other classes.
    """
    if is_name(label) != is_name(first):
        raise DataError(
            f"{where}: the label is {quoted(label)}, but {quoted(first)} at {first_where}; expected"
            " either numbers or names"
        )


def _field(text: str, field: str, where: str) -> Any:
    content = read_json(text, where, f"an object with the field {field!r}")
    found = (
        [value for name, value in content if name == field]
        if isinstance(content, JsonObject)
        else []
    )
    if len(found) != 1:
        fields = listing([name for name, _ in content]) if isinstance(content, JsonObject) else ""
        raise DataError(
            f"{where}: the field {quoted(field)} occurs {len(found)} times"
            f" ({fields or 'no fields'}); name the label's in `label_field`"
        )
    return found[0]
