"""Criteria and selections of the tiny task."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.adaptation import SelectedIndex, attach
from pipeline.adaptation.packing import describe, to_pack
from pipeline.packs import Pack
from pipeline.specs import Level, Recipe
from pipeline.training import Inputs

FAMILIES = ("vit", "swin", "convnext", "convnext_linear")


LEVELS: tuple[Level, ...] = ("neuron", "layer", "network")


CRITERIA: dict[str, dict[str, Any]] = {
    "gradient": {},
    "cross-entropy": {"loss": "cross_entropy"},
    "magnitude": {"criterion": "magnitude"},
    "activation": {"criterion": "activation"},
    "random": {"criterion": "random"},
}


RECOMPUTED = ("magnitude", "random")


TOP_K = 4


def same(first: SelectedIndex, second: SelectedIndex) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True)
    )


def packed(inputs: Inputs, recipe: Recipe, found: SelectedIndex) -> tuple[Pack, Any]:
    classes = inputs.index.classes
    model = attach(inputs.backbone, recipe, len(classes), selected=found)
    for parameter in model.values.parameters():
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(7)
        )
    return to_pack(model, describe(inputs.task, recipe, inputs.backbone, classes)), model
