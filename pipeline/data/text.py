"""Text files that people write or export: tables, lists, JSON and class names.

They come from editors and spreadsheets of every system, so byte order marks, UTF-16 and all three
kinds of line ends are supported.
"""

from __future__ import annotations

import codecs

from pipeline.data.urls import fetch
from pipeline.errors import DataError


def read_text(path: str, expected: str) -> str:
    """The text at a path or URL: UTF-8, or UTF-16 with a byte order mark.

    Raises DataError that names the line.
    """
    content = fetch(path)
    encoding = (
        "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    )
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        where = _line(content[: error.start].decode("latin-1"))
        raise DataError(
            f"{path}: {where}: byte 0x{content[error.start]:02x} is not UTF-8 text; expected"
            f" {expected}; save it as UTF-8"
        ) from None
    before, nul, _ = text.partition("\0")
    if nul:
        raise DataError(
            f"{path}: {_line(before)}: holds a NUL character; expected {expected}; save it as UTF-8"
        )
    return text


def _line(before: str) -> str:
    return f"line {len(lines_of(before))}"


def lines_of(text: str) -> list[str]:
    """The lines of a text, which may end in LF, CRLF or CR.

    `str.splitlines` also splits at U+2028 and others, which may be part of a file's name.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
