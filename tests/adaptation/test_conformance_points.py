"""Every part passes `check_part` on a point transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_points import POINT_BACKBONE

from pipeline.adaptation import RankedIndices
from pipeline.adaptation.sites import weight_shapes
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.specs import Input, Recipe
from pipeline.testing import check_part

PARTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "connections": {"connections": {"top_k": 2}},
    "biases and norms": {"biases": {}, "norms": {"which": "all"}},
    "smoa with prompts": {"smoa": {"experts": 2, "width": 4, "prompt_generator": True}},
    "adapter": {"adapter": {"width": 4}},
    "adapter after_both": {"adapter": {"width": 4, "placement": "after_both"}},
    "lora": {"lora": {"rank": 3, "targets": ["qkv", "proj", "fc1", "fc2"]}},
    "fact": {"fact": {"rank": 3}},
    "dtl and prompts": {"dtl": {"rank": 3}, "prompts": {"count": 2}},
    "deep prompts and class token": {"prompts": {"count": 2, "deep": True}, "class_token": {}},
    "ssf": {"ssf": {}},
    "full": {"full": {}},
    "head on a subspace": {"head": {"bits": 2, "rank": 8}},
    "head without bias": {"head": {"bits": 1, "bias": False}},
    **{f"head at {bits} bits": {"head": {"bits": bits}} for bits in (1, 2, 4, 8, 16, 32)},
}


@pytest.fixture(scope="module")
def backbone() -> LoadedBackbone:
    return load_backbone(POINT_BACKBONE, Input())


@pytest.mark.parametrize("name", PARTS)
def test_a_part_keeps_its_promises_on_points(backbone: LoadedBackbone, name: str) -> None:
    selected = None
    if "connections" in PARTS[name]:
        selected = {
            layer: RankedIndices.unranked(
                (torch.arange(neurons)[:, None] * inputs + torch.arange(2)).reshape(-1)
            )
            for layer, (neurons, inputs) in weight_shapes(backbone.model).items()
        }
    check_part(Recipe.model_validate(PARTS[name]), backbone, selected=selected)
