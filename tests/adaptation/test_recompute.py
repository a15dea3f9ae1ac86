"""Blocks that are computed again in the backward pass: the same gradients, bit for bit, in less
memory.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers_cases import for_every
from pydantic import ValidationError

from pipeline.adaptation import AdaptedModel, SelectedIndex, attach
from pipeline.backbones import load_backbone
from pipeline.errors import BackboneError
from pipeline.specs import Backbone, Input, Recipe

RECIPES = {
    "default": {"preset": "default"},
    "drop path": {
        "connections": {"top_k": 2},
        "adapter": {"placement": "after_both", "dropout": 0.2},
        "training": {"drop_path": 0.4},
    },
    "lora": {"biases": {}, "lora": {"rank": 2, "targets": ["fc1"], "dropout": 0.2}},
    "dtl": {"dtl": {"feed_from": 0}, "norms": {}},
    "prompts": {"prompts": {"count": 2}, "norms": {}},
    "generator": {"smoa": {"experts": 3, "width": 2, "prompt_generator": True}},
}
Select = Callable[..., SelectedIndex]


def model_of(backbone: Backbone, recipe: dict, select: Select, recompute: bool) -> AdaptedModel:  # type: ignore[type-arg]
    training = {**recipe.get("training", {}), "recompute": recompute or None}
    loaded = load_backbone(backbone, Input(size_px=32))
    parsed = Recipe.model_validate({**recipe, "training": training})
    selected = select(loaded, 2) if parsed.connections is not None else None
    return attach(loaded, parsed, 5, selected=selected, seed=1)


def step(model: AdaptedModel, low: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Loss, gradients, and the bytes kept for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.arange(4 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(4, 3, 32, 32)
    model.compute_in(torch.bfloat16 if low else torch.float32)
    model.train()
    model.reseed(torch.Generator().manual_seed(5))
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=low),
    ):
        loss = model(images).float().square().mean() + model.auxiliary_loss()
    loss.backward()
    return loss.detach(), [each.grad for each in model.values.parameters()], sum(kept.values())  # type: ignore[misc]


@for_every(
    ("family", "recipe", "low"),
    [
        *(("vit", recipe, False) for recipe in RECIPES),
        ("vit", "default", True),
        ("swin", "drop path", False),
        ("convnext", "default", False),
    ],
)
def test_gradients_are_the_same_bit_for_bit(
    family: str,
    recipe: str,
    low: bool,
    families: dict[str, Backbone],
    random_selection: Select,
) -> None:
    models = [
        model_of(families[family], RECIPES[recipe], random_selection, recompute)
        for recompute in (False, True)
    ]
    (loss, gradients, kept), (same_loss, same, fewer) = (step(model, low) for model in models)
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same, strict=True))
    assert fewer < kept
    loads = [[bank.expert_load.tolist() for bank in model.banks] for model in models]
    assert loads[0] == loads[1]


def test_networks_without_such_blocks_are_refused(random_selection: Select) -> None:
    resnet = Backbone(
        model="resnet18",
        arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
        weights="random",
    )
    with pytest.raises(BackboneError, match=r"training\.recompute: it needs blocks with a norm"):
        model_of(resnet, {"norms": {"which": "all"}}, random_selection, True)
    with pytest.raises(ValidationError, match=r"blocks that training\.recompute computes again"):
        Recipe.model_validate({"full": {}, "training": {"recompute": True}})
