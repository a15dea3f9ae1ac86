"""The head on a subspace: the projection is the transform it claims to be, costs no byte, and is
the same for every reader.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.adaptation import attach, plan
from pipeline.adaptation.head import LinearHead, subspace
from pipeline.adaptation.packing import SizePlanner, describe
from pipeline.backbones import load_backbone
from pipeline.errors import BackboneError
from pipeline.specs import Backbone, Head, Recipe, Task
from pipeline.testing import check_refused

CLASSES = ("one", "two", "three")
SIGNS_OF_64 = 0xE0F5899D63813450


@pytest.mark.parametrize(("rank", "width"), [(1, 6), (3, 6), (6, 6), (16, 96), (5, 7)])
def test_the_projection_is_a_signed_cosine_transform(rank: int, width: int) -> None:
    """Against the sum of its definition, and with the signs of the first column's row."""
    found = subspace(rank, width).double().numpy() * rank / width
    signs = np.sign(found[0])
    for row in range(rank):
        for column in range(width):
            scale = math.sqrt((1 if row == 0 else 2) / width)
            cosine = scale * math.cos(math.pi * row * (2 * column + 1) / (2 * width))
            assert found[row, column] == pytest.approx(signs[column] * cosine, abs=1e-6)
    np.testing.assert_allclose(found @ found.T, np.eye(rank), atol=1e-6)


def test_the_signs_never_change() -> None:
    """Every pack with such a head was trained on them."""
    bits = (subspace(1, 64)[0] < 0).tolist()
    assert sum(int(bit) << place for place, bit in enumerate(bits)) == SIGNS_OF_64


def test_a_smaller_subspace_is_part_of_a_larger_one() -> None:
    torch.testing.assert_close(subspace(4, 24) * 4, subspace(9, 24)[:4] * 9)


def test_a_head_on_a_subspace_is_a_linear_layer_on_the_feature() -> None:
    generator = torch.Generator().manual_seed(0)
    head = LinearHead(24, 5)
    head.current = {
        "weight": torch.randn(3, 5, generator=generator),
        "bias": torch.randn(3, generator=generator),
    }
    plain = torch.nn.Linear(24, 3)
    plain.load_state_dict(head.plain_tensors())
    features = torch.randn(4, 24, generator=generator)
    expected = features @ subspace(5, 24).T @ head.current["weight"].T + head.current["bias"]
    torch.testing.assert_close(head(features), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain(features), expected, rtol=1e-5, atol=1e-5)
    assert not head.state_dict(), "the projection is recomputed, not stored"


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32])
def test_only_the_values_on_the_subspace_cost_bytes(
    bits: int, tiny_task: Task, tiny_backbone: Backbone
) -> None:
    backbone = load_backbone(tiny_backbone, tiny_task.input)
    planner = SizePlanner(tiny_task, backbone, CLASSES)
    head = Recipe.model_validate({"head": {"bits": bits, "rank": 16, "bias": False}})
    scales = 4 if bits <= 8 else 0
    assert planner.ledger(head)["head"] == len(CLASSES) * 16 * bits // 8 + scales


def test_a_rank_must_fit_the_feature(tiny_task: Task, tiny_backbone: Backbone) -> None:
    backbone = load_backbone(tiny_backbone, tiny_task.input)
    assert plan(backbone, Recipe(head=Head(rank=64)), 3)[0].shape == (3, 64)
    message = check_refused(Recipe(head=Head(rank=65)), backbone)
    assert message.startswith("recipe.head.rank: given 65, but the backbone's feature has 64")


def test_a_rank_beyond_the_feature_is_refused_before_any_memory_is_claimed(
    tiny_task: Task, tiny_backbone: Backbone
) -> None:
    backbone = load_backbone(tiny_backbone, tiny_task.input)
    with pytest.raises(BackboneError, match=r"head\.rank: given 1000000000000"):
        attach(backbone, Recipe(head=Head(rank=10**12)), 3)


@pytest.mark.parametrize("rank", [0, -1, 2.5])
def test_a_rank_is_a_positive_number(rank: float) -> None:
    with pytest.raises(ValidationError, match="rank"):
        Head.model_validate({"rank": rank})


def test_a_whole_head_is_described_as_before(tiny_task: Task, tiny_backbone: Backbone) -> None:
    """Recipes without the key keep their bytes, and their trials' keys."""
    backbone = load_backbone(tiny_backbone, tiny_task.input)
    assert describe(tiny_task, Recipe(), backbone, CLASSES).recipe["head"] == {
        "bits": 8,
        "bias": True,
    }
