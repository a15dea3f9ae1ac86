"""DTL against the released code's formulas, written out on timm's own blocks; which blocks are
read and added to, and what is refused.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.adaptation import AdaptedModel, attach, plan
from pipeline.adaptation.packing import describe, from_pack, to_pack
from pipeline.adaptation.parts.dtl import SideMap, SideSums
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.errors import BackboneError, PackDamaged
from pipeline.specs import Backbone, Input, Recipe, SearchSpace, Task

DEEP = Backbone(
    model="vit_tiny_patch16_224",
    arguments={"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2},
    weights="random",
)


@pytest.fixture(scope="module")
def backbone() -> LoadedBackbone:
    return load_backbone(DEEP, Input(size_px=32))


def moved(backbone: LoadedBackbone, **settings: object) -> AdaptedModel:
    """With every value somewhere else than at its start."""
    recipe = {"dtl": {"rank": 3, "bits": 32, **settings}, "head": {"bits": 32}}
    model = attach(backbone, Recipe.model_validate(recipe), 2)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.values.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model


def images(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)


def by_formula(
    model: AdaptedModel, vit: nn.Module, values: dict[str, torch.Tensor], first: int
) -> torch.Tensor:
    """The released code's forward pass, block by block, with a beta of 5 and a scale of 0.5."""
    x = vit.patch_embed(model.normalise(images()))
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
    total = torch.zeros(())
    for number, block in enumerate(vit.blocks):
        name = f"dtl.blocks.{number}"
        total = total + x @ values[f"{name}.down"].T @ values[f"{name}.up"].T
        x = block(x)
        if number >= first:
            x = x + 0.5 * total * torch.sigmoid(5 * total)
    return vit.forward_head(vit.norm(x)) @ values["head.weight"].T + values["head.bias"]


@pytest.mark.parametrize(("given", "first"), [(None, 2), (0, 0), (1, 1), (3, 3)])
def test_outputs_and_gradients_are_those_of_the_released_code(
    given: int | None, first: int, backbone: LoadedBackbone
) -> None:
    model = moved(backbone, feed_from=given, beta=5.0, scale=0.5)
    values = {
        tensor.name: value.detach().clone().requires_grad_()
        for tensor, value in model.values().items()
    }
    expected, found = by_formula(model, backbone.model, values, first), model(images())
    torch.testing.assert_close(found, expected)
    for outputs in (expected, found):
        outputs.square().sum().backward()
    for group in model.values.groups():
        assert group.latent_N.grad is not None
        pieces = group.pieces(group.latent_N.grad)
        for tensor, gradient in zip(group.tensors, pieces, strict=True):
            own = values[tensor.name].grad
            assert own is not None
            largest = float(own.abs().max())
            assert largest > 0
            torch.testing.assert_close(
                gradient.view(own.shape), own, rtol=1e-3, atol=1e-4 * largest, msg=tensor.name
            )


def test_nothing_is_differentiated_before_the_first_block_that_is_added_to(
    backbone: LoadedBackbone,
) -> None:
    model, needed = moved(backbone), []
    for block in model.backbone.blocks:
        block.mlp.register_forward_hook(
            lambda module, inputs, output: needed.append(output.requires_grad)
        )
    model(images()).sum().backward()
    assert needed == [False, False, False, True]


def test_no_sum_outlives_its_pass(backbone: LoadedBackbone) -> None:
    """Nor does one of a pass that failed half-way enter the next one."""
    model = moved(backbone)
    sums = {id(each.sums): each.sums for each in _maps(model)}
    (only,) = sums.values()
    with torch.inference_mode():
        expected = model(images())
        assert only._sums == {}
        last = model.backbone.blocks[3].mlp
        plain, last.forward = last.forward, _failing
        with pytest.raises(RuntimeError, match="half-way"):
            model(images(seed=1)[:2])
        assert only._sums == {}, "nothing keeps its memory"
        last.forward = plain
        assert torch.equal(model(images()), expected)


def _maps(model: AdaptedModel) -> list[SideMap]:
    found = [module for module, _ in model._receivers.values() if isinstance(module, SideMap)]
    assert len({id(each) for each in found}) == 4
    assert all(isinstance(each.sums, SideSums) for each in found)
    return found


def _failing(*arguments: object) -> torch.Tensor:
    raise RuntimeError("half-way")


def values_of(spec: Backbone, recipe: dict[str, object], size_px: int = 32) -> dict[str, int]:
    planned = plan(load_backbone(spec, Input(size_px=size_px)), Recipe.model_validate(recipe), 10)
    return {each.name: each.values for each in planned if each.part == "adapters"}


def test_a_vit_b_has_the_released_codes_number_of_values() -> None:
    """12 blocks with two matrices of 768 x 2."""
    spec = Backbone(model="vit_base_patch16_224", weights="random")
    assert sum(values_of(spec, {"dtl": {}}).values()) == 12 * 2 * 768 * 2 == 36_864


def test_of_a_swin_the_stages_that_are_added_to_are_read() -> None:
    """The released scripts read blocks 4 to 23 of Swin-B and add to 14 to 23: as if of depth 2, 2,
    4, 2, blocks 4 to 9, and 6 to 9.
    """
    arguments = {
        **{"img_size": 64, "patch_size": 2, "window_size": 4, "embed_dim": 8},
        **{"depths": [2, 2, 4, 2], "num_heads": [1, 1, 2, 2]},
    }
    spec = Backbone(
        model="swin_tiny_patch4_window7_224",
        arguments=arguments,  # type: ignore[arg-type]
        weights="random",
    )
    read = {
        name.rpartition(".")[0].removeprefix("dtl.")
        for name in values_of(spec, {"dtl": {"feed_from": 6}}, 64)
    }
    assert read == {f"layers.2.blocks.{number}" for number in range(4)} | {
        f"layers.3.blocks.{number}" for number in range(2)
    }


def test_blocks_before_from_block_are_not_read(backbone: LoadedBackbone) -> None:
    names = values_of(DEEP, {"dtl": {"feed_from": 0}, "from_block": 2})
    assert {name.split(".")[2] for name in names} == {"2", "3"}


@pytest.mark.parametrize(
    ("spec", "recipe", "message"),
    [
        (DEEP, {"feed_from": 4}, "feed_from: given 4, but VisionTr.* has 4 blocks .* at most 3"),
        (
            Backbone(model="resnet18", weights="random"),
            {},
            "recipe.dtl: nothing in ResNet matches it; it needs blocks with a norm next to an MLP",
        ),
    ],
)
def test_what_does_not_fit_the_backbone_is_refused(
    spec: Backbone, recipe: dict[str, object], message: str
) -> None:
    with pytest.raises(BackboneError, match=message):
        values_of(spec, {"dtl": recipe})


def test_a_pack_that_does_not_fit_its_backbone_is_damaged(backbone: LoadedBackbone) -> None:
    """A server goes on when it meets one."""
    recipe = Recipe.model_validate({"dtl": {"bits": 1}})
    task = Task.model_validate(
        {"name": "a", "data": {"format": "digits"}, "backbone": DEEP, "recipe": recipe}
    )
    names = ("one", "two", "three")
    pack = to_pack(attach(backbone, recipe, 3), describe(task, recipe, backbone, names))
    written = pack.metadata.recipe
    changed = {**written, "dtl": {**written["dtl"], "feed_from": 99}}
    pack = replace(pack, metadata=pack.metadata.model_copy(update={"recipe": changed}))
    with pytest.raises(PackDamaged, match=r"has no place on its backbone: .* given 99"):
        from_pack(pack, backbone)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"dtl": {"rank": 0}}, "greater than or equal to 1"),
        ({"dtl": {"beta": 0}}, "greater than 0"),
        ({"dtl": {"feed_from": -1}}, "greater than or equal to 0"),
        ({"dtl": {"dropout": 0.1}}, "Extra inputs|unknown"),
        (
            {"dtl": {}, "smoa": {"prompt_generator": True}},
            "dtl sums over blocks of equally many tokens",
        ),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(recipe: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(recipe)


def test_the_search_sets_its_bits_rank_and_scale() -> None:
    space = SearchSpace(bits=(1, 4), width=(4,), scale=(0.1, 1.0))
    recipes = [
        space.recipe(Recipe.model_validate({"dtl": {}}), point).dtl for point in space.points()
    ]
    assert {(each.bits, each.rank, each.scale) for each in recipes if each is not None} == {
        (1, 4, 0.1),
        (1, 4, 1.0),
        (4, 4, 0.1),
        (4, 4, 1.0),
    }
