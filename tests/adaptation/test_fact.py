"""FacT-TT against the released code's formulas, written out on timm's own blocks; what is
refused.
"""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pipeline.adaptation import attach, plan
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.errors import BackboneError
from pipeline.specs import Backbone, Input, Recipe, SearchSpace

RANK = 3


@pytest.fixture(scope="module")
def backbone(families: dict[str, Backbone]) -> LoadedBackbone:
    return load_backbone(families["vit"], Input(size_px=32))


def fact(
    x: torch.Tensor, factor_in: torch.Tensor, core: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """FacTv(FacTs(FacTu(x))) of the released code for one piece of width D, without dropout."""
    return x @ factor_in.T @ core.T @ out.T


def test_a_block_computes_the_released_codes_formulas(backbone: LoadedBackbone) -> None:
    recipe = Recipe.model_validate(
        {"fact": {"rank": RANK, "bits": 32, "scale": 0.5}, "head": {"bits": 32}}
    )
    model = attach(backbone, recipe, 2)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.values.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    values = {tensor.name: value.detach() for tensor, value in model.values().items()}
    original, adapted = backbone.model.blocks[0], model.backbone.blocks[0]
    width = backbone.width
    u, v = values[f"fact.width{width}.in"], values[f"fact.width{width}.out"]
    x = torch.randn(2, 5, width, generator=generator)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))  # hands out the values
        core = values["fact.blocks.0.attn.qkv.core"].split(RANK)
        expected = original.attn.qkv(x) + 0.5 * torch.cat(
            [fact(x, u, each, v) for each in core], dim=-1
        )
        torch.testing.assert_close(adapted.attn.qkv(x), expected)
        core = values["fact.blocks.0.attn.proj.core"]
        torch.testing.assert_close(
            adapted.attn.proj(x), original.attn.proj(x) + 0.5 * fact(x, u, core, v)
        )
        core = values["fact.blocks.0.mlp.fc1.core"].split(RANK)
        expected = original.mlp.fc1(x) + 0.5 * torch.cat(
            [fact(x, u, each, v) for each in core], dim=-1
        )
        torch.testing.assert_close(adapted.mlp.fc1(x), expected)
        wide = torch.randn(2, 5, original.mlp.fc2.in_features, generator=generator)
        narrow = torch.cat([piece @ u.T for piece in wide.split(width, dim=-1)], dim=-1)
        expected = (
            original.mlp.fc2(wide) + 0.5 * narrow @ values["fact.blocks.0.mlp.fc2.core"].T @ v.T
        )
        torch.testing.assert_close(adapted.mlp.fc2(wide), expected)


def test_a_vit_b_has_the_papers_number_of_values() -> None:
    """2 x 768 x r + 12 layers x 12 r x r: 36,864 at rank 16 for the cores, 24,576 for the
    factors.
    """
    spec = Backbone(model="vit_base_patch16_224", weights="random")
    planned = plan(
        load_backbone(spec, Input(size_px=32)), Recipe.model_validate({"fact": {"rank": 16}}), 10
    )
    count = sum(tensor.values for tensor in planned if tensor.part == "adapters")
    assert count == 2 * 768 * 16 + 12 * 12 * 16 * 16 == 61_440


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"fact": {"targets": ["query"]}},
            "given 'query', which matches no Linear layer .*; it has .*fc1",
        ),
        ({"fact": {"targets": ["head"]}}, "given 'head'"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(
    recipe: dict[str, object], message: str, backbone: LoadedBackbone
) -> None:
    with pytest.raises(BackboneError, match=f"recipe.fact.targets: {message}"):
        attach(backbone, Recipe.model_validate(recipe), 2)


def test_lora_beside_it_is_refused() -> None:
    with pytest.raises(ValidationError, match="lora and fact both change the weights"):
        Recipe.model_validate({"fact": {}, "lora": {}})


def test_the_search_sets_its_bits_and_rank() -> None:
    space = SearchSpace(bits=(1, 4), width=(4, 16))
    recipes = [
        space.recipe(Recipe.model_validate({"fact": {}}), point).fact for point in space.points()
    ]
    assert [(part.bits, part.rank) for part in recipes if part is not None] == [
        (1, 4),
        (1, 16),
        (4, 4),
        (4, 16),
    ]
