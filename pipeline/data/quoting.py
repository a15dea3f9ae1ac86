"""What errors quote of people's data: cut short and on one line, for a cell, a key or a name may be of any length."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_QUOTED_MAX = 60
_PATH_MAX = 120
_LISTED_MAX = 5


def shortened(text: str, most: int = _QUOTED_MAX) -> str:
    """A text without its middle where it is long, and escaped where it would not print."""
    text = text if len(text) <= most else f"{text[: most // 2 - 3]}...{text[-(most // 2) :]}"
    return text if text.isprintable() else repr(text)[1:-1]


def shortened_path(path: str) -> str:
    """A path or URL that was found in the data."""
    return shortened(path, _PATH_MAX)


def quoted(value: Any) -> str:
    """A value: in quotes where it is text, by its kind where it is a list or an object of JSON."""
    if isinstance(value, str):
        return f"'{shortened(value)}'"
    return "a list or an object" if isinstance(value, list | dict) else shortened(repr(value))


def listing(names: Collection[str], most: int = _LISTED_MAX) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(shortened(name, 30) for name in list(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
