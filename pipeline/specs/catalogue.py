"""Suites and methods: by name from the catalogue that comes with taskpack, or from a path."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import SpecError
from pipeline.specs.method import Method
from pipeline.specs.suite import Suite
from pipeline.specs.task import Task
from pipeline.specs.task_files import load_tasks
from pipeline.specs.yaml_files import load_spec

SUITE_FILE = "suite.yaml"


def catalogue_folder() -> Path:
    """The folder of the task files that come with taskpack: next to the package in a clone,
    otherwise where it was installed.
    """
    clone = Path(__file__).resolve().parents[2] / "tasks"
    return clone if clone.is_dir() else Path(sys.prefix) / "share" / "taskpack"


def known_methods() -> list[str]:
    """The names of the catalogue's methods."""
    return sorted(path.stem for path in (catalogue_folder() / "methods").glob("*.yaml"))


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
        lacks = (
            "is in none of its groups" if differing[0] in tasks else "has no task file next to it"
        )
        raise SpecError(
            f"{folder / SUITE_FILE}: groups: the task {differing[0]!r} {lacks}; name every task of"
            " the folder once"
        )
    return suite, [tasks[task] for task in suite.tasks]


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
