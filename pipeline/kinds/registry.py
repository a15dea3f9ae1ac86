"""Task kinds by name."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TypeVar

from pipeline.kinds.protocol import TaskKind

_KINDS: dict[str, TaskKind] = {}
_Kind = TypeVar("_Kind", bound=TaskKind)


def register_kind(kind: type[_Kind]) -> type[_Kind]:
    """Class decorator: register a task kind under its `name`. Raises ValueError for a taken
    name.
    """
    if kind.name in _KINDS:
        raise ValueError(f"the task kind {kind.name!r} is registered twice; rename one")
    _KINDS[kind.name] = kind()
    return kind


def kind_named(name: str) -> TaskKind:
    """The kind that is called `name`. Raises ValueError with the known names."""
    _import_all()
    if name not in _KINDS:
        raise ValueError(f"expected one of: {', '.join(sorted(_KINDS))}")
    return _KINDS[name]


def kind_names() -> list[str]:
    """All registered kinds, in alphabetical order."""
    _import_all()
    return sorted(_KINDS)


def _import_all() -> None:
    """Import every module of this folder, so that a new file is all that a new kind needs."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
