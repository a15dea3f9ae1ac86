"""A task's recipe as its backbone has room for it.

The parts that a preset brought are meant for any backbone: those that find no place on this one are left out, and the default search space with
them. A part that the user named stays, so that `plan` refuses it by name.
"""

from __future__ import annotations

from pipeline.adaptation.plan import plan
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError
from pipeline.spec import Recipe, Task, default_space


def on_backbone(task: Task, backbone: LoadedBackbone) -> tuple[Task, tuple[str, ...]]:
    """The task with the parts of its preset that the backbone has a place for, and the names of those that were left out."""
    recipe, brought = task.recipe, task.recipe.preset or ()
    if not brought:
        return task, ()
    absent = tuple(part for part in brought if not _has_place(backbone, Recipe.model_validate({part: getattr(recipe, part)})))
    resolved = recipe.model_copy(update={"preset": None, **dict.fromkeys(absent)})
    is_default_space = task.search.axes() == default_space(recipe).axes()
    axes = default_space(resolved).axes() if is_default_space else task.search.axes()
    search = type(task.search)(**axes, trials=task.search.trials)
    return task.model_copy(update={"recipe": resolved, "search": search}), absent


def _has_place(backbone: LoadedBackbone, recipe: Recipe) -> bool:
    try:
        plan(backbone, recipe, class_count=2)
    except BackboneError:
        return False
    return True
