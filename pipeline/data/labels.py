"""What a label means: a class's number, counted from 0, or the name of a class where the names are declared."""

from __future__ import annotations

import json
from collections.abc import Sequence
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


def class_number(label: Any, names: Sequence[str] | None, where: str) -> int:
    """The class that `label` means, which may be outside of `names`; text in digits is a number. Raises DataError naming `where`."""
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) <= _DIGITS_MAX:
        return int(label)
    if type(label) is int and 0 <= label < 10**_DIGITS_MAX:  # JSON's true is an int to Python
        return label
    if isinstance(label, str) and names is not None and label in names:
        return names.index(label)
    expected = "a whole number from 0" + (", or one of the names in `classes`" if names is not None else "")
    raise DataError(f"{where}: the label is {quoted(label)}; expected {expected}")


def member_label(content: bytes, field: str | None, names: Sequence[str] | None, where: str) -> int:
    """The class that a shard's `key.cls` names, or, with `field`, that field of `key.json`. Raises DataError."""
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text; expected a label") from None
    label = class_number(text if field is None else _field(text, field, where), names, where)
    if names is not None and label >= len(names):
        raise DataError(f"{where}: label {label} is outside the {len(names)} classes; expected 0 to {len(names) - 1}")
    return label


def _field(text: str, field: str, where: str) -> Any:
    expected = f"an object with the field {field!r}, once"
    content = read_json(text, where, expected)
    found = [value for name, value in content if name == field] if isinstance(content, JsonObject) else []
    if len(found) != 1:
        names = listing([name for name, _ in content]) if isinstance(content, JsonObject) else type(content).__name__
        raise DataError(f"{where}: holds {names or 'nothing'}; expected {expected}, which `label_field` can name")
    return found[0]
