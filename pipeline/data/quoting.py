"""Quoting user data in error messages: shortened and on one line, because a cell, key or name may
have any length.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_QUOTED_MAX = 60
_PATH_MAX = 120
_LISTED_MAX = 5


def shortened(text: str, most: int = _QUOTED_MAX) -> str:
    """A text without its middle if it is long, with unprintable characters escaped."""
    text = text if len(text) <= most else f"{text[: most // 2 - 3]}...{text[-(most // 2) :]}"
    return text if text.isprintable() else repr(text)[1:-1]


def shortened_path(path: str) -> str:
    """A path or URL from the data."""
    return shortened(path, _PATH_MAX)


def quoted(value: Any) -> str:
    """A value: quoted if it is text, by its type if it is a JSON list or object."""
    if isinstance(value, str):
        return f"'{shortened(value)}'"
    return "a list or an object" if isinstance(value, list | dict) else shortened(repr(value))


def listing(names: Collection[str], most: int = _LISTED_MAX) -> str:
    """The first few names, and the number of further ones."""
    shown = ", ".join(shortened(name, 30) for name in list(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
