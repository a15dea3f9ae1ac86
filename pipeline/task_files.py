"""Reading task files: YAML in, validated specs out, and every fault in words.

A section of a task file may be the path of a YAML file that holds it, relative to the task file, so that a hundred tasks can share one backbone and
one recipe. A fault names file, key, given value and what was expected.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipeline.errors import SpecError
from pipeline.spec import Backbone, Budget, Recipe, SearchSpace, Selection, Spec, Task

_SHARED_SECTIONS: dict[str, type[Spec]] = {"backbone": Backbone, "recipe": Recipe, "search": SearchSpace, "budget": Budget, "selection": Selection}
_DATA_PATHS = ("train", "val", "test", "root")
SpecType = TypeVar("SpecType", bound=Spec)


def load_tasks(paths: list[Path], *, overrides: dict[str, Any] | None = None) -> list[Task]:
    """Read task files, or folders of them, as one batch. Names must differ.

    Relative paths inside a task file are resolved against its folder. `overrides` gives sections as a mapping or a YAML path: of `search` and
    `budget` it replaces the keys it names, other sections whole.
    """
    files = [file for path in paths for file in _task_files(path)]
    tasks: dict[str, tuple[Task, Path]] = {}
    for file in files:
        task = load_task(file, overrides=overrides)
        if task.name in tasks:
            raise SpecError(f"{file}: name: given {task.name!r}, which {tasks[task.name][1]} has too; give each task of a batch its own name")
        tasks[task.name] = (task, file)
    return [task for task, _ in tasks.values()]


def _task_files(path: Path) -> list[Path]:
    if not path.exists():
        raise SpecError(f"{path}: no such task file or folder; give a .yaml file or a folder that holds some")
    if path.is_file():
        return [path]
    files = [file for file in sorted(path.glob("*.y*ml")) if "data" in read_mapping(file)]
    if not files:
        raise SpecError(f"{path}: this folder holds no task file (a .yaml with a `data` section)")
    return files


def load_task(path: Path, *, overrides: dict[str, Any] | None = None) -> Task:
    """Read one task file. Raises SpecError."""
    content = read_mapping(path)
    for section, kind in _SHARED_SECTIONS.items():
        if isinstance(content.get(section), str):
            shared = (path.parent / content[section]).resolve()
            if not shared.is_file():
                raise SpecError(
                    f"{path}: {section}: given {content[section]!r}; expected a mapping, or the path of a YAML file: there is no {shared}"
                )
            content[section] = _resolve_paths(section, read_mapping(shared), shared.parent)
            validate(kind, content[section], source=str(shared))  # so that a fault is reported under the file that holds it
        elif isinstance(content.get(section), dict):
            content[section] = _resolve_paths(section, content[section], path.parent)
    for section, value in (overrides or {}).items():
        if isinstance(value, (str, Path)):
            value = _resolve_paths(section, read_mapping(Path(value)), Path(value).parent)
        base = content.get(section)
        if section in ("search", "budget") and isinstance(base, dict) and isinstance(value, dict):
            value = {**base, **value}
        content[section] = value
    if isinstance(content.get("data"), dict):
        content["data"] = _resolve_paths("data", {"format": "shards", **content["data"]}, path.parent)
    return validate(Task, content, source=str(path))


def load_spec(kind: type[SpecType], path: Path) -> SpecType:
    """Read a YAML file as `kind`. Raises SpecError."""
    return validate(kind, read_mapping(path), source=str(path))


class _UniqueKeys(yaml.SafeLoader):
    """YAML without objects, and without the silent loss of a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated[0]!r} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds. Raises SpecError."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise SpecError(f"{path}: nested too deeply to be a task file") from None
    if not isinstance(content, dict):
        raise SpecError(f"{path}: expected a mapping of keys to values, found {type(content).__name__}")
    return content


def _resolve_paths(section: str, content: dict[str, Any], folder: Path) -> dict[str, Any]:
    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        return value if not isinstance(value, str) or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value) else str((folder / value).resolve())

    keys: tuple[str, ...] = ()
    if section == "data":
        keys = _DATA_PATHS + (("classes",) if isinstance(content.get("classes"), str) else ())
    elif section == "backbone" and content.get("weights") not in (None, "pretrained", "random"):
        keys = ("weights",)
    return {key: resolve(value) if key in keys else value for key, value in content.items()}


def validate(kind: type[SpecType], content: dict[str, Any], *, source: str) -> SpecType:
    """Build `kind` from plain data. Raises SpecError with one line per fault: source, key, given, expected."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        expected: dict[str, list[str]] = {}  # the members of a union each report a fault of their own: one line for all of them
        for fault in error.errors():
            if fault["type"] == "default_factory_not_called":  # the house space waits for a valid recipe
                continue
            given, message = _explain(kind, fault, content)
            expected.setdefault(given, []).append(message)
        raise SpecError("\n".join(f"{source}: {given}; {' or '.join(messages)}" for given, messages in expected.items())) from None


def _explain(kind: type[Spec], fault: Any, content: Any) -> tuple[str, str]:
    """What was given at which key, and what was expected."""
    key = ".".join(_written_keys(fault["loc"], content))
    if fault["type"] == "missing":
        return f"{key}: missing", "this key is required"
    given = f"given {_shortened(fault['input'])}"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(kind, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{key}: unknown key, {given}", f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{key}: {given}", fault["msg"].removeprefix("Value error, ")


def _written_keys(location: tuple[Any, ...], content: Any) -> Iterator[str]:
    """The parts of a fault's location that the user wrote: pydantic puts union members and discriminators among them."""
    for part in location:
        inside = (isinstance(content, dict) and part in content) or (
            isinstance(content, (list, tuple)) and isinstance(part, int) and part < len(content)
        )
        if inside:
            content = content[part]
        if inside or (part == location[-1] and isinstance(content, dict)):
            yield str(part)


def _shortened(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):  # keys that JSON does not know, or a value that holds itself
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys(kind: type[Spec], location: tuple[Any, ...]) -> list[str]:
    kinds: list[Any] = [kind]
    for part in location:
        nested = [
            argument for known in kinds for name, field in known.model_fields.items() if name == part for argument in _specs_in(field.annotation)
        ]
        tagged = [known for known in kinds if "format" in known.model_fields and part in _literal_values(known)]
        kinds = nested or tagged or kinds
    return sorted({name for known in kinds for name in known.model_fields})


def _literal_values(kind: type[Spec]) -> tuple[Any, ...]:
    return getattr(kind.model_fields["format"].annotation, "__args__", ())


def _specs_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for argument in getattr(annotation, "__args__", ()) for spec in _specs_in(argument)]
