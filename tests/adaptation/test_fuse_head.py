"""The head that fuses maps: its maps against timm's, its logits against plain modules, and its
promises as a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.adaptation import SelectedIndex, attach, plan
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.specs import Backbone, Input, Recipe
from pipeline.testing import check_part, check_refused

SIDE = 32


SAM2 = Backbone(
    model="sam2_hiera_tiny",
    arguments={
        "embed_dim": 16,
        "num_heads": 1,
        "stages": [1, 1, 2, 1],
        "global_att_blocks": [3],
        "window_spec": [4, 2, 2, 2],
    },
    weights="random",
)
"""The encoder of SAM 2, tiny; of its window attention and its global one, each in a block."""


@pytest.fixture(scope="module")
def families(families: Mapping[str, Backbone]) -> dict[str, Backbone]:
    """With the encoder of SAM 2."""
    return {**families, "sam2": SAM2}


def load(spec: Backbone, gives_maps: bool = True) -> LoadedBackbone:
    return load_backbone(spec, Input(size_px=SIDE), gives_maps=gives_maps)


def expected_logits(
    backbone: LoadedBackbone, indices: list[int], values: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The head written with modules, on timm's own maps of an image of zeros."""
    pixels = (
        torch.zeros(1, 3, SIDE, SIDE) - torch.tensor(backbone.images.mean).view(1, 3, 1, 1)
    ) / (torch.tensor(backbone.images.std).view(1, 3, 1, 1))
    maps = backbone.fresh_model().forward_intermediates(  # type: ignore[operator]
        pixels,
        indices=indices,
        norm=hasattr(backbone.model, "norm"),
        output_fmt="NCHW",
        intermediates_only=True,
    )
    x = torch.cat([functional.interpolate(m, maps[0].shape[2:], mode="bilinear") for m in maps], 1)
    width = len(values["head.mix"])
    mix = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    mix.weight.data = values["head.mix"].view(width, 1, 3, 3)
    y = torch.einsum("oi,bihw->bohw", values["head.reduce"], x).relu()
    logits = torch.einsum("oi,bihw->bohw", values["head.weight"], y + mix(y))
    logits = logits + values["head.bias"][:, None, None]
    return functional.interpolate(logits, (SIDE, SIDE), mode="bilinear")


def deep_vit(families: Mapping[str, Backbone]) -> Backbone:
    arguments = {**families["vit"].arguments, "depth": 8}
    return families["vit"].model_copy(update={"arguments": arguments})


@pytest.mark.parametrize("family", ["vit", "convnext", "sam2"])
def test_it_computes_what_its_formula_says(family: str, families: Mapping[str, Backbone]) -> None:
    spec = deep_vit(families) if family == "vit" else families[family]
    backbone, taken = load(spec), [1, 3, 5, 7] if family == "vit" else [0, 1, 2, 3]
    recipe = Recipe.model_validate({"head": {"fuse": 6, "bits": 32}})
    model = attach(backbone, recipe, 3)
    with torch.no_grad():
        for value in model.values.parameters():
            value.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(value)))
        values = {tensor.name: each for tensor, each in model.values().items()}
        found = model(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
        torch.testing.assert_close(found, expected_logits(backbone, taken, values))


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("vit", {"head": {"fuse": 4, "bits": 2, "rank": 8}, "connections": {}, "biases": {}}),
        ("convnext", {"head": {"fuse": 4, "bits": 4}, "smoa": {"experts": 2, "width": 4}}),
        ("sam2", {"head": {"fuse": 4, "bits": 2}, "connections": {}, "lora": {}, "norms": {}}),
        ("sam2", {"head": {"bits": 2}, "adapter": {"width": 2, "bits": 1}, "biases": {}}),
    ],
    ids=["vit", "convnext", "sam2", "sam2 and a linear head"],
)
def test_it_keeps_the_promises_of_a_part(
    family: str,
    recipe: dict[str, object],
    families: Mapping[str, Backbone],
    random_selection: Callable[..., SelectedIndex],
) -> None:
    backbone = load(families[family])
    check_part(Recipe.model_validate(recipe), backbone, selected=random_selection(backbone, 4))


def test_it_is_as_large_as_the_docs_say(families: Mapping[str, Backbone]) -> None:
    recipe = Recipe.model_validate({"head": {"fuse": 16, "rank": 8, "bits": 2}})
    shapes = {each.name: each.shape for each in plan(load(families["vit"]), recipe, 3)}
    assert shapes == {
        "head.reduce": (16, 8),
        "head.mix": (16, 9),
        "head.weight": (3, 16),
        "head.bias": (3,),
    }


def test_where_it_has_no_place_it_is_refused(families: Mapping[str, Backbone]) -> None:
    fuse = Recipe.model_validate({"head": {"fuse": 4}})
    pooled = load(families["vit"], gives_maps=False)
    assert "gives this task the output of one pooled feature" in check_refused(fuse, pooled)
    wide = Recipe.model_validate({"head": {"fuse": 4, "rank": 4096}})
    assert "recipe.head.rank: given 4096" in check_refused(wide, load(families["vit"]))
    with pytest.raises(ValueError, match=r"head\.fuse reads maps of blocks before from_block"):
        Recipe.model_validate({"head": {"fuse": 4}, "biases": {}, "from_block": 1})
