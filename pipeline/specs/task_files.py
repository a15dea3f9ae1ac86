"""Reading task files: YAML in, validated specs out.

A section of a task file may be the path of a YAML file that holds it, and a task file may inherit
from another, its `base`, whose keys its own override recursively. Both paths are relative to the
file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import SpecError
from pipeline.specs import (
    PARTS,
    About,
    Backbone,
    Budget,
    Input,
    Recipe,
    SearchSpace,
    Selection,
    Spec,
    Task,
)
from pipeline.specs.faults import validate
from pipeline.specs.paths import expand_data_root, resolve_data_paths, resolve_paths
from pipeline.specs.yaml_files import read_mapping

_SHARED_SECTIONS: dict[str, type[Spec]] = {
    "about": About,
    "input": Input,
    "backbone": Backbone,
    "recipe": Recipe,
    "search": SearchSpace,
    "budget": Budget,
    "selection": Selection,
}


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
        content["data"] = expand_data_root(content["data"], path)
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
        else resolve_paths(section, read_mapping(file), file.parent)
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
            own = resolve_paths(section, written[section], path.parent)
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
    content = resolve_paths(section, read_mapping(shared), shared.parent)
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
    return {**inherited, **resolve_data_paths({"format": inherited["format"], **own}, path)}
