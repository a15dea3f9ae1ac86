"""Names of classes, declared or found, without pairs that look the same to a reader."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.data.quoting import quoted, shortened
from pipeline.data.text import lines_of, read_text
from pipeline.errors import DataError
from pipeline.kinds import Label, classes_in

_NAME_MAX = 200
_NUMBER = re.compile(r"(-?[0-9]{1,18})(\.0*)?")


def class_names(classes: tuple[str, ...] | str) -> list[str]:
    """The given names, or those in a file (or URL) with one name per line. Raises DataError."""
    where = classes if isinstance(classes, str) else "classes"
    lines = (
        lines_of(read_text(classes, "one class name a line"))
        if isinstance(classes, str)
        else classes
    )
    names = [line.strip() for line in lines if line.strip()]
    check_names(names, where)
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise DataError(
            f"{where}: the class {quoted(name)} is named {times} times; expected different names"
        )
    return names


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Each class's number by its name."""
    return {name: number for number, name in enumerate(names)}


def shown_label(label: Label, classes: Sequence[str]) -> str:
    """A label by its classes' names, for people."""
    return " and ".join(repr(classes[number]) for number in classes_in(label)) or "without a label"


def check_names(names: Iterable[str], where: str) -> None:
    """Raise DataError if a name cannot be used, or two names are the same.

    They are if they differ only by white space, case, Unicode form or the spelling of a number.
    """
    first: dict[str, str] = {}
    for name in sorted(names):
        if len(name) > _NAME_MAX or not _is_text(name):
            raise DataError(
                f"{where}: the class name {quoted(name)} cannot be used; expected at most"
                f" {_NAME_MAX} characters of one line of text"
            )
        other = first.setdefault(_folded(name), name)
        if other != name:
            alike = (
                f"{other!a} and {name!a}"
                if _looks(other) == _looks(name)
                else f"{other!r} and {name!r}"
            )
            raise DataError(
                f"{where}: the class names {shortened(alike, 160)} are one name written in two"
                " ways; write it in one way, or rename one"
            )


def _is_text(name: str) -> bool:
    """Whether a name can be stored and shown: it has no lone surrogate and no control character."""
    return not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name
    )


def _looks(name: str) -> str:
    """A name without invisible differences: Unicode form, white space, characters such as
    U+200B.
    """
    visible = "".join(
        character
        for character in unicodedata.normalize("NFKC", name)
        if unicodedata.category(character) != "Cf"
    )
    return " ".join(visible.split())


def _folded(name: str) -> str:
    number = _NUMBER.fullmatch(_looks(name))
    return str(int(number[1])) if number else _looks(_looks(name).casefold())
