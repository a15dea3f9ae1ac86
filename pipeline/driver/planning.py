"""What is computed for a task before its trials run, beside its selection: its recipe and search
space, whether they can be used, and the sizes of its packs.

On a cluster workers compute it, because the driver follows many studies at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.adaptation.packing import SizePlanner
from pipeline.driver.coded_positions import CodedPositions, Compute
from pipeline.driver.elsewhere import Elsewhere
from pipeline.errors import BackboneError
from pipeline.search.run_study import check_budget
from pipeline.search.trial import recipe_key
from pipeline.selection import read_selection
from pipeline.specs import Recipe, Task
from pipeline.training import Inputs
from pipeline.training.calibrate import check_samples
from pipeline.training.rehearsal import rehearse

LISTED_POINTS = 1000
"""The largest search space whose packs are all sized before its first trial, in a few seconds."""


def check_study(inputs: Inputs) -> None:
    """Check that validation has samples enough for a coverage, that something fits the budget, and
    that each part of the recipe runs on the backbone. Raises TaskpackError.
    """
    task = inputs.task
    if task.coverage is not None:
        check_samples(task.coverage, inputs.validation_samples)
    check_budget(task, SizePlanner(task, inputs.backbone, inputs.index.classes).size_bytes)
    check_parts(inputs)


def check_parts(inputs: Inputs) -> None:
    """Check that each part of the recipes runs on the backbone. Raises BackboneError."""
    for recipe in inputs.task.search.fullest(inputs.task.recipe):
        rehearse(inputs, recipe)


def resolved(inputs: Inputs, check: Callable[[Inputs], None]) -> tuple[Task, list[str]]:
    """A task with its recipe and search space resolved, and remarks for the user; raises what
    `check` raises.
    """
    inputs = inputs.with_task(inputs.task)
    check(inputs)
    return inputs.task, inputs.remarks()


def listed_sizes(inputs: Inputs, selection: Path | None) -> dict[str, int]:
    """The size in bytes of the pack of every recipe in a task's search space, by `recipe_key`,
    without those that the backbone has no place for.
    """
    task, planner = inputs.task, _planner(inputs, selection, _here)
    sizes = {}
    for point in task.search.points():
        recipe = task.search.recipe(task.recipe, point)
        with contextlib.suppress(BackboneError):  # raised again if a study proposes it
            sizes[recipe_key(recipe)] = planner.size_bytes(recipe)
    return sizes


def size_of(
    inputs: Inputs, selection: Path | None, elsewhere: Elsewhere
) -> Callable[[Recipe], int]:
    """What gives the size in bytes of a recipe's pack. A worker plans all recipes of the space
    beforehand, unless there are too many.

    Args:
        selection: the file of the task's selection, if it has one.
    """
    planner = _planner(inputs, selection, elsewhere)
    if not elsewhere.has_workers() or inputs.task.search.size() > LISTED_POINTS:
        return planner.size_bytes
    sizes: dict[str, int] = elsewhere.on(inputs, listed_sizes, selection)
    return lambda recipe: sizes.get(recipe_key(recipe)) or planner.size_bytes(recipe)


def _planner(inputs: Inputs, selection: Path | None, compute: Compute) -> SizePlanner:
    classes = inputs.index.classes
    if selection is None:
        return SizePlanner(inputs.task, inputs.backbone, classes)
    code = CodedPositions(selection, compute)
    return SizePlanner(inputs.task, inputs.backbone, classes, read_selection(selection), code)


def _here(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
