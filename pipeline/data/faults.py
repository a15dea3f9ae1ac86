"""Faults of single images, collected so that one error message names them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.data.urls import Unreachable
from pipeline.errors import DataError

_SHOWN = 10


class Faults:
    """The faults of images; `check` raises them."""

    def __init__(self, noun: str = "images") -> None:
        self.messages: list[str] = []
        self._noun = noun

    def add(self, message: str) -> None:
        """Add a fault."""
        self.messages.append(printable(message))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Add the DataError that the block raises, unless it is not the image's fault."""
        try:
            yield
        except Unreachable:
            raise
        except DataError as error:
            self.add(str(error))

    def check(self) -> None:
        """Raise DataError if there are faults, with their number and the first ten."""
        if len(self.messages) == 1:
            raise DataError(self.messages[0])
        if self.messages:
            lines = [
                f"{len(self.messages):,} {self._noun} cannot be used; fix or remove them:",
                *self.messages[:_SHOWN],
            ]
            hidden = len(self.messages) - _SHOWN
            raise DataError("\n  ".join([*lines, f"and {hidden:,} more"] if hidden > 0 else lines))


def printable(text: str) -> str:
    """Escape what cannot be printed: line ends, bytes that are not UTF-8."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )
