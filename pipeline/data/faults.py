"""Faults of single images, gathered so that one report names them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.data.urls import Unreachable
from pipeline.errors import DataError

_SHOWN = 10


class Faults:
    """What is wrong with images; `check` raises it."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Note a fault."""
        self.messages.append(printable(message))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Note the DataError that the block raises, unless it is no fault of the image."""
        try:
            yield
        except Unreachable:
            raise
        except DataError as error:
            self.add(str(error))

    def check(self) -> None:
        """Raise DataError where there are faults: the only one, or their number and the first ten."""
        if len(self.messages) == 1:
            raise DataError(self.messages[0])
        if self.messages:
            lines = [f"{len(self.messages):,} images cannot be used; fix or remove them:", *self.messages[:_SHOWN]]
            hidden = len(self.messages) - _SHOWN
            raise DataError("\n  ".join([*lines, f"and {hidden:,} more"] if hidden > 0 else lines))


def printable(text: str) -> str:
    """`text` with what cannot be printed as escapes: line ends, bytes that are not UTF-8."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
