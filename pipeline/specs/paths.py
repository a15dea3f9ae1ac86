"""The paths in a task file: relative to the file, or below `$TASKPACK_DATA`, the folder where a
machine keeps its datasets.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pipeline.errors import SpecError
from pipeline.specs.task import Task

DATA_ROOT = "TASKPACK_DATA"
_DATA_PATHS = ("train", "val", "test", "root")
_FOLDER_MODEL = "local-dir:"
_NAMED_WEIGHTS = ("pretrained", "random")
_ROOTED_FORMATS = ("lists", "json")  # whose splits are files inside `root`
_IMAGES_FORMATS = ("coco",)  # whose `images` are folders that do not depend on another key


def resolve_paths(section: str, content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A section with absolute paths. `resolve_data_paths` is for the section `data`."""
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


def resolve_data_paths(content: dict[str, Any], task_file: Path) -> dict[str, Any]:
    """A data section with absolute paths, those below `$TASKPACK_DATA` as they are written."""
    keys = _data_keys(content)
    return {
        key: _resolved(value, task_file.parent, keep=f"${DATA_ROOT}") if key in keys else value
        for key, value in content.items()
    }


def expand_data_root(content: dict[str, Any], task_file: Path) -> dict[str, Any]:
    """A data section whose paths have `$TASKPACK_DATA` replaced by this machine's folder.

    Raises:
        SpecError: A path needs the variable and it is not set.
    """
    keys = _data_keys(content)
    return {
        key: _below_data_root(value, key, task_file) if key in keys else value
        for key, value in content.items()
    }


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


def _data_keys(content: dict[str, Any]) -> tuple[str, ...]:
    """The keys of a data section that hold paths."""
    keys: tuple[str, ...] = ("root",) if content["format"] in _ROOTED_FORMATS else _DATA_PATHS
    keys = (*keys, "images") if content["format"] in _IMAGES_FORMATS else keys
    return (*keys, "classes") if isinstance(content.get("classes"), str) else keys


def _below_data_root(value: Any, key: str, task_file: Path) -> Any:
    """Expand a leading `$TASKPACK_DATA`. No other variable is expanded, so that a task file shows
    what its paths depend on.
    """
    if isinstance(value, list):
        return [_below_data_root(item, key, task_file) for item in value]
    if isinstance(value, dict):
        return {name: _below_data_root(each, key, task_file) for name, each in value.items()}
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


def _as_list(value: Any) -> list[str]:
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    return list(value.values() if isinstance(value, dict) else value)


def _resolved(value: Any, folder: Path, keep: str | None = None) -> Any:
    """Make paths absolute, except URLs and paths that begin with the folder `keep`."""
    if isinstance(value, list):
        return [_resolved(item, folder, keep) for item in value]
    if isinstance(value, dict):
        return {name: _resolved(each, folder, keep) for name, each in value.items()}
    if not isinstance(value, str) or _is_url(value) or value.split("/")[0] == keep:
        return value
    return str((folder / os.path.expanduser(value)).resolve())


def _is_url(path: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None
