"""What a label means: a class's number, counted from 0, or the name of a class where the names are declared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.data.quoting import listing, quoted, shortened
from pipeline.errors import DataError

_DIGITS_MAX = 9  # longer runs of digits are no label


class JsonObject(list[tuple[str, Any]]):
    """A JSON object with its keys as they were written, repeated ones too."""


def read_json(text: str, where: str, expected: str) -> Any:
    """The content of a JSON text, its objects as JsonObject. Raises DataError naming `where`."""
    try:
        return json.loads(text, object_pairs_hook=JsonObject)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({shortened(str(error), 100)}); expected {expected}") from None


def class_number(label: Any, numbers: Mapping[str, int] | None, where: str) -> int:
    """The class that `label` means: a whole number (also as text), of any size, or one of the names in `numbers`.

    Raises DataError naming `where`.
    """
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) <= _DIGITS_MAX:
        return int(label)
    if type(label) is int and 0 <= label < 10**_DIGITS_MAX:  # JSON's true is an int to Python
        return label
    if isinstance(label, str) and numbers is not None and label in numbers:
        return numbers[label]
    expected = "a whole number from 0" + (", or one of the names in `classes`" if numbers is not None else "")
    raise DataError(f"{where}: the label is {quoted(label)}; expected {expected}")


def member_label(content: bytes, field: str | None, numbers: Mapping[str, int] | None, where: str) -> int:
    """The class that a shard's `key.cls` names, or, with `field`, that field of `key.json`. Raises DataError."""
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text; expected a label") from None
    label = class_number(text if field is None else _field(text, field, where), numbers, where)
    if numbers is not None and label >= len(numbers):
        raise DataError(f"{where}: label {label} is outside the {len(numbers)} classes; expected 0 to {len(numbers) - 1}")
    return label


def _field(text: str, field: str, where: str) -> Any:
    content = read_json(text, where, f"an object with the field {field!r}")
    found = [value for name, value in content if name == field] if isinstance(content, JsonObject) else []
    if len(found) != 1:
        fields = listing([name for name, _ in content]) if isinstance(content, JsonObject) else ""
        raise DataError(f"{where}: the field {quoted(field)} occurs {len(found)} times ({fields or 'no fields'}); name the label's in `label_field`")
    return found[0]
