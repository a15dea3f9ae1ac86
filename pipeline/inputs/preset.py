"""Fit a preset recipe to a backbone and budget.

Parts of a preset that do not fit the backbone are left out. With the default search space, so are
the largest parts while no configuration is sure to be within the budget, and the axes of parts that
were left out. A part that the user named is kept, so that an error can name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.adaptation.packing import SizePlanner
from pipeline.adaptation.recipe_plan import plan
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError
from pipeline.specs import Recipe, SearchSpace, Task, default_space


def on_backbone(
    task: Task, backbone: LoadedBackbone, classes: Sequence[str]
) -> tuple[Task, dict[str, str]]:
    """The task with the parts of its preset that fit it, and the reason why each other part was
    left out.
    """
    brought = task.recipe.preset or ()
    if not brought:
        return task, {}
    absent = dict.fromkeys(
        (part for part in brought if not _has_place(backbone, _alone(task.recipe, part))),
        "no place in the backbone",
    )
    resolved = _without(task, absent)
    parts = [part for part in brought if part not in absent and _is_default_space(task)]
    while parts and _smallest_bytes(resolved, backbone, classes) > task.budget.max_bytes:
        largest = max(
            parts, key=lambda part: _smallest_bytes(_only(resolved, part), backbone, classes)
        )
        parts.remove(largest)
        absent[largest] = (
            f"the default recipe with it may take more than {task.budget.max_bytes:,} bytes"
        )
        resolved = _without(task, absent)
    return resolved, absent


def _without(task: Task, absent: Iterable[str]) -> Task:
    recipe = task.recipe.model_copy(update={"preset": None, **dict.fromkeys(absent)})
    axes = default_space(recipe).axes() if _is_default_space(task) else task.search.axes()
    return task.model_copy(
        update={"recipe": recipe, "search": SearchSpace(**axes, trials=task.search.trials)}
    )


def _is_default_space(task: Task) -> bool:
    return task.search.axes() == default_space(task.recipe).axes()


def _alone(recipe: Recipe, part: str) -> Recipe:
    return Recipe.model_validate({part: getattr(recipe, part)})


def _only(task: Task, part: str) -> Task:
    recipe = _alone(task.recipe, part)
    return task.model_copy(update={"recipe": recipe, "search": default_space(recipe)})


def _smallest_bytes(task: Task, backbone: LoadedBackbone, classes: Sequence[str]) -> int:
    """Upper bound of the smallest configuration's size, over all selections."""
    point = {axis: min(values) for axis, values in task.search.axes().items()}
    return SizePlanner(task, backbone, classes).largest_bytes(
        task.search.recipe(task.recipe, point)
    )


def _has_place(backbone: LoadedBackbone, recipe: Recipe) -> bool:
    try:
        plan(backbone, recipe, class_count=2)
    except BackboneError:
        return False
    return True
