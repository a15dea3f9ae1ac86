"""Packs as if trained, with any parts, and what each gives alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipeline.adaptation import SelectedIndex, attach
from pipeline.adaptation.packing import describe, to_pack
from pipeline.backbones import LoadedBackbone
from pipeline.packs import Pack, pack_to_bytes, read_pack
from pipeline.specs import Recipe, Task


def of_masks(task: Task) -> Task:
    """The same task, of a class for each pixel."""
    return task.model_copy(update={"kind": "segmentation", "metric": "mIoU"})


def moved_pack(
    backbone: LoadedBackbone,
    task: Task,
    sections: Mapping[str, Any],
    *,
    classes: int = 3,
    seed: int = 0,
    selected: SelectedIndex | None = None,
) -> Pack:
    """A pack of a recipe, read from its bytes, with every value moved from its start."""
    recipe = Recipe.model_validate(sections)
    model = attach(backbone, recipe, classes, selected=selected, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.values.parameters():
        parameter.data += torch.empty_like(parameter).normal_(0, 0.05, generator=generator)
    names = [f"class {number}" for number in range(classes)]
    return read_pack(pack_to_bytes(to_pack(model, describe(task, recipe, backbone, names))))


def moved_packs(
    backbone: LoadedBackbone,
    task: Task,
    recipes: Mapping[str, Mapping[str, Any]],
    select: Callable[..., SelectedIndex],
    *,
    top_k: int,
    classes: int = 3,
) -> dict[str, Pack]:
    """A pack of each recipe by its name; every one has a class more than the one before."""
    return {
        name: moved_pack(
            backbone,
            task,
            recipe,
            classes=classes + seed,
            seed=seed,
            selected=select(backbone, top_k, seed),
        )
        for seed, (name, recipe) in enumerate(recipes.items())
    }
