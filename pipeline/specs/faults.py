"""Building a spec from plain data, with an error message for every fault: source, key, given value
and what was expected.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.errors import SpecError
from pipeline.specs.section import Spec

SpecType = TypeVar("SpecType", bound=Spec)


def validate(kind: type[SpecType], content: dict[str, Any], *, source: str) -> SpecType:
    """Build `kind` from plain data. Raises SpecError with one line per fault: source, key, given,
    expected.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        expected: dict[
            str, list[str]
        ] = {}  # the members of a union each report a fault of their own: one line for all of them
        for fault in error.errors():
            if (
                fault["type"] == "default_factory_not_called"
            ):  # the default space waits for a valid recipe
                continue
            given, message = _explain(kind, fault, content)
            expected.setdefault(given, []).append(message)
        raise SpecError(
            "\n".join(
                f"{source}: {given}; {' or '.join(messages)}"
                for given, messages in expected.items()
            )
        ) from None


def _explain(kind: type[Spec], fault: Any, content: Any) -> tuple[str, str]:
    """Format a fault as what was given at which key, and what was expected."""
    key = ".".join(_written_keys(fault["loc"], content))
    if fault["type"] == "missing":
        return f"{key}: missing", "this key is required"
    given = f"given {_shortened(fault['input'])}"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(kind, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        return (
            f"{key}: unknown key, {given}",
            f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}",
        )
    return f"{key}: {given}", fault["msg"].removeprefix("Value error, ")


def _written_keys(location: tuple[Any, ...], content: Any) -> Iterator[str]:
    """The parts of a fault's location that the user wrote: pydantic puts union members and
    discriminators among them.
    """
    for part in location:
        inside = (isinstance(content, dict) and part in content) or (
            isinstance(content, (list, tuple)) and isinstance(part, int) and part < len(content)
        )
        if inside:
            content = content[part]
        is_missing = (
            part == location[-1] and isinstance(content, dict) and part != content.get("format")
        )
        if inside or is_missing:
            yield str(part)


def _shortened(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except (
        TypeError,
        ValueError,
        RecursionError,
    ):  # keys that JSON does not know, or a value that holds itself
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys(kind: type[Spec], location: tuple[Any, ...]) -> list[str]:
    kinds: list[Any] = [kind]
    for part in location:
        nested = [
            argument
            for known in kinds
            for name, field in known.model_fields.items()
            if name == part
            for argument in _specs_in(field.annotation)
        ]
        tagged = [
            known
            for known in kinds
            if "format" in known.model_fields and part in _literal_values(known)
        ]
        kinds = nested or tagged or kinds
    return sorted({name for known in kinds for name in known.model_fields})


def _literal_values(kind: type[Spec]) -> tuple[Any, ...]:
    return getattr(kind.model_fields["format"].annotation, "__args__", ())


def _specs_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [
        spec for argument in getattr(annotation, "__args__", ()) for spec in _specs_in(argument)
    ]
