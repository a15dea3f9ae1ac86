"""Fit a preset recipe to a backbone.

Parts of a preset that have no place in the backbone are left out, and the default search space is
derived. A part that the user named is kept, so that an error can name it.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.adaptation.parts.lora import convolution_targets
from pipeline.adaptation.recipe_plan import plan
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError
from pipeline.inputs.dial import derived_space
from pipeline.specs import Lora, Recipe, Task
from pipeline.specs.recipe import part_of_one_bit


def on_backbone(
    task: Task, backbone: LoadedBackbone, classes: Sequence[str]
) -> tuple[Task, dict[str, str]]:
    """The task with the parts of its preset that have a place, and with its search space; and the
    reason why each other part was left out.
    """
    brought = task.recipe.preset or ()
    if not brought:
        return task, {}
    task = _with_convolutions(task, backbone)
    absent = dict.fromkeys(
        (part for part in brought if not _has_place(backbone, _alone(task.recipe, part))),
        "no place in the backbone",
    )
    recipe = task.recipe.model_copy(update={"preset": None, **dict.fromkeys(absent)})
    resolved = task.model_copy(update={"recipe": recipe})
    if not task.search.is_empty:
        return resolved, absent
    offered = [part for part in brought if part not in absent]
    search = derived_space(resolved, backbone, classes, offered)
    return resolved.model_copy(update={"search": search}), absent


def _with_convolutions(task: Task, backbone: LoadedBackbone) -> Task:
    """The task whose offered LoRA changes 1x1 convolutions, where a backbone of maps has no q and
    v: benchmarks/results/segmentation.md.
    """
    is_offered = "lora" in (task.recipe.preset or ()) and task.search.is_empty
    if not (is_offered and backbone.gives_maps) or _has_place(
        backbone, _alone(task.recipe, "lora")
    ):
        return task
    targets = convolution_targets(backbone.model)
    if not targets:
        return task
    recipe = task.recipe.model_copy(update={"lora": Lora(bits=1, targets=targets)})
    return task.model_copy(update={"recipe": recipe})


def _alone(recipe: Recipe, part: str) -> Recipe:
    return Recipe.model_validate({part: getattr(recipe, part) or part_of_one_bit(part)})


def _has_place(backbone: LoadedBackbone, recipe: Recipe) -> bool:
    try:
        plan(backbone, recipe, class_count=2)
    except BackboneError:
        return False
    return True
