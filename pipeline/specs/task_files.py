"""Reading task files: YAML in, validated specs out, and an error message for every fault.

A section of a task file may be the path of a YAML file that holds it, and a task file may inherit
from another, its `base`, whose keys its own override recursively. Both paths are relative to the
file. A data path may begin with `$TASKPACK_DATA`, the folder where a machine keeps its datasets. An
error names file, key, given value and what was expected.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipeline.errors import SpecError
from pipeline.specs import (
    PARTS,
    About,
    Backbone,
    Budget,
    Input,
    Method,
    Recipe,
    SearchSpace,
    Selection,
    Spec,
    Suite,
    Task,
)

DATA_ROOT = "TASKPACK_DATA"
SUITE_FILE = "suite.yaml"
_SHARED_SECTIONS: dict[str, type[Spec]] = {
    "about": About,
    "input": Input,
    "backbone": Backbone,
    "recipe": Recipe,
    "search": SearchSpace,
    "budget": Budget,
    "selection": Selection,
}
_DATA_PATHS = ("train", "val", "test", "root")
_FOLDER_MODEL = "local-dir:"
_NAMED_WEIGHTS = ("pretrained", "random")
_ROOTED_FORMATS = ("lists", "json")  # whose splits are files inside `root`
SpecType = TypeVar("SpecType", bound=Spec)


def load_tasks(
    paths: list[Path], *, overrides: dict[str, Any] | None = None, expand: bool = True
) -> list[Task]:
    """Read task files, or folders of task files, as one batch. Their names must differ.

    Args:
        overrides: sections to replace, as a mapping or the path of a YAML file; of `search` and
            `budget`, only the given keys are replaced.
        expand: whether to expand `$TASKPACK_DATA`, which another machine may set differently.

    Raises:
        SpecError: A file is missing or invalid.
    """
    files = [file for path in paths for file in _task_files(path)]
    tasks: dict[str, tuple[Task, Path]] = {}
    for file in files:
        task = load_task(file, overrides=overrides, expand=expand)
        if task.name in tasks:
            raise SpecError(
                f"{file}: name: given {task.name!r}, which {tasks[task.name][1]} also has; give"
                " each task of a batch its own name"
            )
        tasks[task.name] = (task, file)
    return [task for task, _ in tasks.values()]


def _task_files(path: Path) -> list[Path]:
    if not path.exists():
        raise SpecError(
            f"{path}: no such task file or folder; give a .yaml file or a folder that holds some"
        )
    if path.is_file():
        return [path]
    files = [file for file in sorted(path.glob("*.y*ml")) if _is_task(read_mapping(file))]
    if not files:
        raise SpecError(
            f"{path}: this folder holds no task file (a .yaml with a `name` and a `data` section)"
        )
    return files


def _is_task(content: dict[str, Any]) -> bool:
    """Whether a file is a task rather than a shared section or a suite. A file with a name but no
    `data` is an invalid task, not to be skipped.
    """
    return "data" in content or ("name" in content and "groups" not in content)


def load_task(path: Path, *, overrides: dict[str, Any] | None = None, expand: bool = True) -> Task:
    """Read one task file, as `load_tasks` does. Raises SpecError."""
    content, files = _read_task(path)
    for section, given in (overrides or {}).items():
        value, base = _read_override(path, section, given), content.get(section)
        if section in ("search", "budget") and isinstance(base, dict) and isinstance(value, dict):
            value = {**base, **value}
        content[section] = value
    if expand and isinstance(content.get("data"), dict):
        content["data"] = _expand_data_root(content["data"], path)
    source = (
        f"{path}, with its base {' and '.join(map(str, files[1:]))}" if files[1:] else str(path)
    )
    return validate(Task, content, source=source)


def _read_override(path: Path, section: str, value: Any) -> Any:
    """Read a section that overrides one of the task file `path`: a mapping, or the path of a YAML
    file.
    """
    if not isinstance(value, (str, Path)):
        return (
            _data_section(value, None, path)
            if section == "data" and isinstance(value, dict)
            else value
        )
    file = Path(value)
    return (
        _data_section(read_mapping(file), None, file)
        if section == "data"
        else _resolve_paths(section, read_mapping(file), file.parent)
    )


def _read_task(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Merge a task file into its base, with absolute paths; also return the files read. `above`:
    the files that inherit from this one.
    """
    written = read_mapping(path)
    base, files = (
        _read_base(path, written.pop("base"), (*above, path)) if "base" in written else ({}, ())
    )
    content = {**base, **written}
    for section in _SHARED_SECTIONS.keys() & written.keys():
        if isinstance(written[section], str):
            content[section] = _read_shared(path, section, written[section])
        elif isinstance(written[section], dict):
            own = _resolve_paths(section, written[section], path.parent)
            content[section] = _written_over(
                _without_parts(base.get(section)) if "preset" in own else base.get(section), own
            )
    if isinstance(written.get("data"), dict):
        content["data"] = _data_section(written["data"], base.get("data"), path)
    return content, (path, *files)


def _read_base(
    path: Path, name: Any, above: tuple[Path, ...]
) -> tuple[dict[str, Any], tuple[Path, ...]]:
    base = path.parent / name if isinstance(name, str) else None
    if base is None or not base.is_file():
        raise SpecError(
            f"{path}: base: given {name!r}; expected the path of a task file to inherit"
            f" from{f': there is no {base}' if base else ''}"
        )
    if base.resolve() in [file.resolve() for file in above]:
        raise SpecError(
            f"{path}: base: given {name!r}, which inherits from this file; a file cannot inherit"
            " from itself"
        )
    return _read_task(base, above)


def _read_shared(path: Path, section: str, name: str) -> dict[str, Any]:
    shared = (path.parent / name).resolve()
    if not shared.is_file():
        raise SpecError(
            f"{path}: {section}: given {name!r}; expected a mapping, or the path of a YAML file:"
            f" there is no {shared}"
        )
    content = _resolve_paths(section, read_mapping(shared), shared.parent)
    validate(
        _SHARED_SECTIONS[section], content, source=str(shared)
    )  # so that a fault is reported under the file that holds it
    return content


def _without_parts(base: Any) -> Any:
    """What a task that names a preset inherits from the recipe of its base: the training
    settings.
    """
    return (
        {key: value for key, value in base.items() if key not in ("preset", *PARTS)}
        if isinstance(base, dict)
        else base
    )


def _written_over(base: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Override `base` with `own`, key by key, recursively."""
    if not isinstance(base, dict):
        return own
    return {
        **base,
        **{
            key: _written_over(base.get(key), value) if isinstance(value, dict) else value
            for key, value in own.items()
        },
    }


def _data_section(own: dict[str, Any], base: Any, path: Path) -> dict[str, Any]:
    """A data section with its format and absolute paths. It inherits from the base's only if that
    has the same format.
    """
    inherited = (
        base
        if isinstance(base, dict) and own.get("format", base["format"]) == base["format"]
        else {"format": "shards"}
    )
    return {**inherited, **_resolve_data_paths({"format": inherited["format"], **own}, path)}


def load_suite(
    name: str | Path, *, overrides: dict[str, Any] | None = None
) -> tuple[Suite, list[Task]]:
    """Read a suite and its tasks, in the suite's order.

    Args:
        name: a folder with a `suite.yaml` next to its tasks, or a suite of the catalogue
            (`vtab1k`).

    Raises:
        SpecError: It is invalid, or the suite names other tasks than the folder has.
    """
    folder = next(
        (
            folder
            for folder in (Path(name), catalogue_folder() / name)
            if (folder / SUITE_FILE).is_file()
        ),
        None,
    )
    if folder is None:
        known = ", ".join(
            sorted(path.parent.name for path in catalogue_folder().glob(f"*/{SUITE_FILE}"))
        )
        raise SpecError(
            f"{name}: no such suite; expected a folder with a {SUITE_FILE}, or one of {known}"
        )
    suite = load_spec(Suite, folder / SUITE_FILE)
    tasks = {task.name: task for task in load_tasks([folder], overrides=overrides)}
    if differing := sorted(tasks.keys() ^ set(suite.tasks)):
        lacks = "is in no group of it" if differing[0] in tasks else "has no task file beside it"
        raise SpecError(
            f"{folder / SUITE_FILE}: groups: the task {differing[0]!r} {lacks}; name every task of"
            " the folder once"
        )
    return suite, [tasks[task] for task in suite.tasks]


def load_methods(names: Sequence[str | Path]) -> dict[str, Method]:
    """Read methods, in the order given: files, or names from the catalogue (`lora`). A method is
    named by its file. Raises SpecError.
    """
    methods: dict[str, Method] = {}
    for name in names:
        path = next(
            (
                path
                for path in (Path(name), catalogue_folder() / "methods" / f"{name}.yaml")
                if path.is_file()
            ),
            None,
        )
        if path is None:
            raise SpecError(
                f"{name}: no such method; expected a YAML file, or one of"
                f" {', '.join(known_methods())}"
            )
        if path.stem in methods:
            raise SpecError(
                f"{path}: the method {path.stem!r} is given twice; give each method its own name"
            )
        methods[path.stem] = load_spec(Method, path)
    return methods


def tasks_to_compare(
    paths: Sequence[Path], suite: str | None, epochs: int | None
) -> tuple[Suite | None, list[Task]]:
    """Read task files, or a suite and its tasks, with `epochs` if given. Raises SpecError unless
    exactly one of them is given.
    """
    if bool(paths) == (suite is not None):
        raise SpecError("give either task files or --suite")
    found, tasks = load_suite(suite) if suite is not None else (None, load_tasks(list(paths)))
    if epochs is None:
        return found, tasks
    return found, [_with_epochs(task, epochs) for task in tasks]


def _with_epochs(task: Task, epochs: int) -> Task:
    """The task with another number of epochs and the same fraction of warm-up."""
    training = task.recipe.training
    scaled = training.changed(
        epochs=epochs, warmup_epochs=training.warmup_epochs * epochs / training.epochs
    )
    return task.changed(recipe=task.recipe.changed(training=scaled))


def known_methods() -> list[str]:
    """The names of the catalogue's methods."""
    return sorted(path.stem for path in (catalogue_folder() / "methods").glob("*.yaml"))


def catalogue_folder() -> Path:
    """The folder of the task files that come with taskpack: next to the package in a clone,
    otherwise where it was installed.
    """
    clone = Path(__file__).resolve().parents[2] / "tasks"
    return clone if clone.is_dir() else Path(sys.prefix) / "share" / "taskpack"


def load_spec(kind: type[SpecType], path: Path) -> SpecType:
    """Read a YAML file as `kind`. Raises SpecError."""
    return validate(kind, read_mapping(path), source=str(path))


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that constructs no objects and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {repeated[0]!r} is written twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises SpecError."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise SpecError(f"{path}: nested too deeply to be a task file") from None
    if not isinstance(content, dict):
        raise SpecError(
            f"{path}: expected a mapping of keys to values, found {type(content).__name__}"
        )
    return content


def _resolve_paths(section: str, content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A section with absolute paths. Those of `data` are resolved separately."""
    if section != "backbone":
        return content
    model, weights = content.get("model"), content.get("weights")
    if isinstance(model, str) and model.startswith(_FOLDER_MODEL):
        content = {
            **content,
            "model": _FOLDER_MODEL + _resolved(model.removeprefix(_FOLDER_MODEL), folder),
        }
    if weights not in (None, *_NAMED_WEIGHTS) and not str(weights).startswith("hf-hub:"):
        content = {**content, "weights": _resolved(weights, folder)}
    return content


def _data_keys(content: dict[str, Any]) -> tuple[str, ...]:
    """The keys of a data section that hold paths."""
    keys: tuple[str, ...] = ("root",) if content["format"] in _ROOTED_FORMATS else _DATA_PATHS
    return (*keys, "classes") if isinstance(content.get("classes"), str) else keys


def _resolve_data_paths(content: dict[str, Any], task_file: Path) -> dict[str, Any]:
    keys = _data_keys(content)
    return {
        key: _resolved(value, task_file.parent, keep=f"${DATA_ROOT}") if key in keys else value
        for key, value in content.items()
    }


def _expand_data_root(content: dict[str, Any], task_file: Path) -> dict[str, Any]:
    keys = _data_keys(content)
    return {
        key: _below_data_root(value, key, task_file) if key in keys else value
        for key, value in content.items()
    }


def _below_data_root(value: Any, key: str, task_file: Path) -> Any:
    """Expand a leading `$TASKPACK_DATA`. No other variable is expanded, so that a task file shows
    what its paths depend on.
    """
    if isinstance(value, list):
        return [_below_data_root(item, key, task_file) for item in value]
    if not isinstance(value, str) or value.split("/")[0] != f"${DATA_ROOT}":
        return value
    root = os.environ.get(DATA_ROOT)
    if not root:
        raise SpecError(
            f"{task_file}: data.{key}: given {value!r}, and {DATA_ROOT} is not set; "
            "set this environment variable to the folder that holds your datasets, or write a path"
        )
    expanded = (
        root if _is_url(root) else str(Path(root).expanduser().resolve())
    ) + value.removeprefix(f"${DATA_ROOT}")
    return _resolved(expanded, task_file.parent)


def local_paths(task: Task) -> list[tuple[str, str]]:
    """Key and path of everything that a task reads from this machine: neither a URL nor below
    `$TASKPACK_DATA`.
    """
    data = task.data.model_dump()
    found = [
        (f"data.{key}", value) for key in _data_keys(data) for value in _as_list(data.get(key))
    ]
    if task.backbone.weights not in _NAMED_WEIGHTS:
        found.append(("backbone.weights", task.backbone.weights))
    if task.backbone.model.startswith(_FOLDER_MODEL):
        found.append(("backbone.model", task.backbone.model.removeprefix(_FOLDER_MODEL)))
    return [
        (key, path)
        for key, path in found
        if not _is_url(path) and path.split("/")[0] != f"${DATA_ROOT}"
    ]


def _as_list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _resolved(value: Any, folder: Path, keep: str | None = None) -> Any:
    """Make paths absolute, except URLs and paths that begin with the folder `keep`."""
    if isinstance(value, list):
        return [_resolved(item, folder, keep) for item in value]
    if not isinstance(value, str) or _is_url(value) or value.split("/")[0] == keep:
        return value
    return str((folder / os.path.expanduser(value)).resolve())


def _is_url(path: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


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
