"""Packs as if trained, with any parts, and what each gives alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.adaptation import SelectedIndex, attach
from pipeline.adaptation.flat import FlatPack, flatten
from pipeline.adaptation.packing import describe, to_pack
from pipeline.adaptation.unpacking import decode
from pipeline.backbones import LoadedBackbone
from pipeline.packs import Pack, pack_to_bytes, read_pack
from pipeline.specs import Recipe, Task

Select = Callable[..., SelectedIndex]

FREE: list[dict[str, Any]] = [
    {},
    {"head": {"bits": 1, "bias": False}},
    {"head": {"bits": 2, "rank": 8}},
    {"lora": {"rank": 3, "targets": ["fc1"]}, "head": {"rank": 5}},
    {"connections": {"top_k": 1, "bits": 1}},
    {"connections": {"top_k": 3, "bits": 16}, "biases": {"bits": 2}, "norms": {}},
    {"biases": {"bits": 32}, "norms": {"which": "all", "parameters": "bias"}},
    {"norms": {"which": "all", "bits": 4}},
    {"smoa": {"experts": 3, "width": 4}},
    {"smoa": {"experts": 1, "width": 6, "bits": 1}},
    {"smoa": {"experts": 5, "width": 2, "placement": "after_mlp", "scale": 2.0}},
    {"smoa": {"experts": 4, "width": 4, "heads": 2, "top_k": 2}, "connections": {"top_k": 2}},
    {"adapter": {"width": 4, "bits": 1}, "biases": {"bits": 3}},
    {"adapter": {"width": 7, "placement": "after_mlp"}},
    {"adapter": {"width": 4, "placement": "after_attention", "scale": 0.5}},
    {"adapter": {"width": 2, "placement": "after_both"}, "smoa": {"experts": 2}},
    {"lora": {"rank": 3}},
    {"lora": {"rank": 2, "targets": ["qkv", "proj", "fc1", "fc2"], "bits": 8}},
    {"fact": {"rank": 3}},
    {"fact": {"rank": 2, "targets": ["fc1", "fc2"], "bits": 1}},
    {"dtl": {"rank": 3}},
    {"dtl": {"rank": 2, "feed_from": 0, "beta": 1.0, "scale": 2.0}, "biases": {"bits": 1}},
    {"ssf": {}, "lora": {"rank": 2}},
    {"smoa": {"experts": 3, "width": 4}, "from_block": 1},
    {"connections": {"top_k": 2}, "adapter": {}, "biases": {}, "from_block": 1},
    {"fact": {"rank": 3}, "norms": {"which": "all"}, "from_block": 1},
    {"dtl": {"rank": 2, "feed_from": 0}, "from_block": 1},
]
"""Recipes of all kinds, which can share one pass of a ViT."""
TOKENS: list[dict[str, Any]] = [
    {"class_token": {}},
    {"prompts": {"count": 2}},
    {"prompts": {"count": 2, "bits": 1}, "connections": {}, "dtl": {"rank": 1}},
    {"prompts": {"count": 3, "deep": True}, "class_token": {"bits": 2}},
    {"smoa": {"experts": 2, "width": 4, "prompt_generator": True}},
    {"smoa": {"experts": 2, "width": 4, "prompt_generator": True, "bits": 1}, "norms": {}},
    {"smoa": {"experts": 3, "width": 4, "prompt_generator": True}},
]
"""Recipes of which those with as many tokens pass a ViT together."""
OTHERS: list[dict[str, Any]] = [
    {"connections": {"top_k": 1}},
    {"connections": {"top_k": 3, "bits": 2}, "norms": {"which": "all"}},
    {"smoa": {"experts": 3, "width": 4}},
    {"adapter": {"width": 4}, "norms": {}},
    {"adapter": {"width": 4, "placement": "after_mlp"}},
    {"lora": {"rank": 3, "targets": ["fc1", "fc2"]}},
    {"ssf": {}},
]
"""Recipes that pass a Swin or a ConvNeXt together."""


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


def packs_of(
    recipes: Sequence[dict[str, Any]], backbone: LoadedBackbone, task: Task, select: Select
) -> list[Pack]:
    """One pack a recipe, each with its own selection, classes and values."""
    return [
        moved_pack(
            backbone,
            task,
            recipe,
            classes=2 + seed % 5,
            seed=seed,
            selected=select(backbone, 3, seed) if "connections" in recipe else None,
        )
        for seed, recipe in enumerate(recipes)
    ]


def images_of(backbone: LoadedBackbone, count: int) -> torch.Tensor:
    """Noise, uint8 [count, 3, S, S]."""
    shape = (count, 3, backbone.size_px, backbone.size_px)
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def flat(packs: Sequence[Pack], backbone: LoadedBackbone) -> list[FlatPack]:
    """The packs as a host keeps them."""
    return [flatten(decode(pack, backbone)) for pack in packs]
