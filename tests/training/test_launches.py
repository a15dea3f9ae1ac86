"""Kernels that a training step launches, counted on the stand-in for a GPU: a step of small kernels
takes as long as the host takes to launch them.
"""

from __future__ import annotations

from typing import Any

import pytest
import standin_device
import torch

from pipeline.adaptation import attach, rank_indices
from pipeline.adaptation.sites import tunable_layers
from pipeline.backbones import load_backbone
from pipeline.kinds import kind_named
from pipeline.specs import Backbone, Input, Recipe
from pipeline.training import loop
from pipeline.training.ranks import ALONE

CATALOGUE = {"connections": {"top_k": 1, "bits": 8}, "biases": {"bits": 8}, "head": {"bits": 8}}
"""What most tasks of the catalogue train."""
HOUSE = {**CATALOGUE, "norms": {}, "smoa": {"experts": 8, "width": 4}}
"""The parts of the default space together."""
BATCH = 8


def launched(part: dict[str, Any], device: str, columns: float) -> int:
    """Operators that compute or copy in one step in bfloat16 on a ViT of 12 blocks, which is as
    many as one of ViT-B takes. `columns`: fraction of a layer's columns in which connections are
    selected.
    """
    arguments: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 12,
        "num_heads": 2,
    }
    backbone = load_backbone(
        Backbone(model="vit_tiny_patch16_224", arguments=arguments, weights="random"),
        Input(size_px=32),
    )
    generator = torch.Generator().manual_seed(0)
    gradients = {
        name: torch.randn(layer.weight.flatten(1).shape, generator=generator)
        for name, layer in tunable_layers(backbone.model).items()
    }
    for gradient in gradients.values():
        gradient[:, round(columns * gradient.shape[1]) :] = 0
    training = {"batch_size": BATCH, "learning_rate": 0.001, "precision": "bf16"}
    recipe = Recipe.model_validate({**part, "training": training})
    model = attach(backbone, recipe, 10, selected=rank_indices(gradients, "neuron", 1)).to(device)
    model.compute_in(torch.bfloat16)
    model.train()
    images = torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8, device=device)
    targets = torch.zeros(BATCH, dtype=torch.long, device=device)
    optimiser = torch.optim.AdamW(model.values.parameters(), lr=0.001, fused=True)
    settings = recipe.training, kind_named("classification"), torch.bfloat16, ALONE, BATCH

    def step() -> None:
        loop._step(model, optimiser, images, targets, *settings)

    step()  # makes what is kept
    with standin_device.counted() as counts:
        step()
    assert not counts["copy to host"] + counts["copy to device"] + counts["synchronisation"]
    return sum(counts.values())


@pytest.mark.parametrize(("part", "limit"), [(CATALOGUE, 500), (HOUSE, 900)])
@pytest.mark.parametrize("columns", [1, 1 / 6])
def test_a_step_launches_few_kernels(
    part: dict[str, Any], limit: int, columns: float, standin: str
) -> None:
    """Wherever connections are. Those of pretrained backbones are in few columns of a layer's
    inputs, which keeps those columns alone.
    """
    assert launched(part, standin, columns) <= limit
