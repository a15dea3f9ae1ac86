"""Bottleneck adapters and LoRA against the papers' formulas written out on timm's own blocks;
seeded dropout; what is refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_backbones import SWIN_V2
from helpers_cases import for_every
from pydantic import ValidationError
from torch import nn

from pipeline.adaptation import AdaptedModel, attach, plan
from pipeline.adaptation.dropout import SeededDropout
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.errors import BackboneError
from pipeline.specs import (
    Adapter,
    Backbone,
    Connections,
    Head,
    Input,
    Lora,
    Recipe,
    SearchSpace,
    Smoa,
    Task,
)

CLASSES = 3
BEIT = Backbone(
    model="beit_base_patch16_224",
    arguments={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    weights="random",
)


def load(spec: Backbone) -> LoadedBackbone:
    return load_backbone(spec, Input(size_px=32))


def moved(backbone: LoadedBackbone, recipe: Recipe) -> tuple[AdaptedModel, dict[str, torch.Tensor]]:
    """A model whose values are all large enough to matter, and its tensors by name."""
    model = attach(backbone, recipe, CLASSES)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.values.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model, {tensor.name: value.detach() for tensor, value in model.values().items()}


def features(model: AdaptedModel, x: torch.Tensor) -> torch.Tensor:
    """Of normalised images."""
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))  # hands the values to the modules
        return model.backbone(x)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def bottleneck(values: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ values[f"{name}.down"].T) @ values[f"{name}.up"].T


# --- bottlenecks ----------------------------------------------------------------------------------


@for_every("placement", ["parallel", "after_mlp", "after_attention", "after_both"])
def test_a_block_computes_the_papers_formula(placement: str, tiny_backbone: Backbone) -> None:
    """With LayerScale, so that it shows that the adapter is not scaled with the branch."""
    backbone = load(
        tiny_backbone.model_copy(
            update={"arguments": {**tiny_backbone.arguments, "init_values": 0.3}}
        )
    )
    model, values = moved(
        backbone,
        Recipe.model_validate(
            {"adapter": {"width": 4, "placement": placement, "scale": 0.7, "bits": 32}}
        ),
    )
    x, z = draw(2, 3, 32, 32), backbone.model
    with torch.inference_mode():
        tokens = z.norm_pre(z._pos_embed(z.patch_embed(x)))
        for number, block in enumerate(z.blocks):
            name = f"adapter.blocks.{number}"
            attended = block.ls1(block.attn(block.norm1(tokens)))
            if placement in ("after_attention", "after_both"):
                attended = attended + 0.7 * bottleneck(values, f"{name}.attention", attended)
            tokens = tokens + attended
            branch = block.ls2(block.mlp(block.norm2(tokens)))
            if placement == "parallel":
                branch = branch + 0.7 * bottleneck(values, f"{name}.mlp", tokens)
            elif placement != "after_attention":
                branch = branch + 0.7 * bottleneck(values, f"{name}.mlp", branch)
            tokens = tokens + branch
        expected = z.forward_head(z.norm(tokens))
    torch.testing.assert_close(features(model, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["convnext", "convnext_linear"])
def test_convnexts_parallel_adapter_reads_the_blocks_input(
    family: str, families: dict[str, Backbone]
) -> None:
    backbone = load(families[family])
    model, values = moved(backbone, Recipe(adapter=Adapter(width=4, bits=32)))
    features(model, draw(1, 3, 32, 32))
    block, adapted = (
        each.get_submodule("stages.1.blocks.0") for each in (backbone.model, model.backbone)
    )
    x = draw(2, 16, 5, 5)
    beside = bottleneck(values, "adapter.stages.1.blocks.0.mlp", x.movedim(1, -1)).movedim(-1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(adapted(x), block(x) + beside, rtol=1e-4, atol=1e-5)


def test_a_post_norm_blocks_parallel_adapter_reads_the_stream() -> None:
    backbone = load(SWIN_V2)
    model, values = moved(backbone, Recipe(adapter=Adapter(width=4, bits=32)))
    features(model, draw(1, 3, 32, 32))
    block, adapted = (
        each.get_submodule("layers.0.blocks.0") for each in (backbone.model, model.backbone)
    )
    x = draw(1, 16, 16, 16)
    with torch.inference_mode():
        stream = x + block.norm1(block._attn(x))
        torch.testing.assert_close(
            adapted(x),
            block(x) + bottleneck(values, "adapter.layers.0.blocks.0.mlp", stream),
            rtol=1e-4,
            atol=1e-4,
        )


# --- LoRA -----------------------------------------------------------------------------------------


@for_every("kind", ["vit", "swin", "swin v2", "beit"])
def test_lora_is_a_low_rank_change_of_the_named_rows(
    kind: str, families: dict[str, Backbone]
) -> None:
    """The same network with the change written into its weights; BEiT and SwinV2 use a layer's
    weight without calling the layer.
    """
    backbone = load({"swin v2": SWIN_V2, "beit": BEIT}.get(kind) or families[kind])
    model, values = moved(
        backbone, Recipe(lora=Lora(rank=3, targets=("v", "q", "fc1"), scale=0.5, bits=32))
    )
    by_hand = backbone.fresh_model()
    for name in (tensor.removesuffix(".up") for tensor in values if tensor.endswith(".up")):
        layer = by_hand.get_submodule(name.removeprefix("lora.").rpartition(".")[0])
        weight, change = (
            layer.weight.detach().clone(),
            0.5 * values[f"{name}.up"] @ values[f"{name}.down"],
        )
        first = {"q": 0, "k": 1, "v": 2}.get(name[-1], 0) * len(change)
        weight[first : first + len(change)] += change
        layer.weight = nn.Parameter(weight, requires_grad=False)
    torch.testing.assert_close(
        features(model, draw(2, 3, 32, 32)), by_hand(draw(2, 3, 32, 32)), rtol=1e-3, atol=1e-3
    )
    # The whole network may hide it: a new SwinV2 block adds nothing yet.
    name = "layers.0.blocks.0.attn" if kind.startswith("swin") else "blocks.0.attn"
    x = draw(1, 16, 16) if kind.startswith("swin") else draw(1, 17, backbone.width)
    with torch.inference_mode():
        changed, written, plain = (
            each.get_submodule(name)(x) for each in (model.backbone, by_hand, backbone.model)
        )
    torch.testing.assert_close(changed, written, rtol=1e-3, atol=1e-5)
    assert float((changed - plain).norm()) > 0.1 * float(plain.norm())


def test_lora_goes_with_connections_on_the_same_layer(
    tiny_backbone: Backbone, random_selection: object
) -> None:
    backbone = load(tiny_backbone)
    selected = random_selection(backbone, 2)  # type: ignore[operator]
    model = attach(
        backbone,
        Recipe(connections=Connections(bits=32), lora=Lora(bits=32)),
        CLASSES,
        selected=selected,
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.values.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    model(torch.zeros(1, 3, 32, 32))
    layer, x = model.backbone.get_submodule("blocks.0.attn.qkv"), draw(1, 17, 64)
    torch.testing.assert_close(
        layer(x), x @ layer.weight.T + layer.base.base.bias, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("targets", "given"), [(("q", "querry"), "'querry'"), (("patch_embed",), "'patch_embed'")]
)
def test_a_target_that_matches_nothing_is_refused_with_those_that_exist(
    targets: tuple[str, ...], given: str, tiny_backbone: Backbone
) -> None:
    message = (
        rf"recipe\.lora\.targets: given {given}, which matches no layer of VisionTransformer; it"
        r" has fc1, fc2, k, proj, q, qkv, v"
    )
    with pytest.raises(BackboneError, match=message):
        plan(load(tiny_backbone), Recipe(lora=Lora(targets=targets)), CLASSES)


def test_the_papers_lora_has_48_matrices_on_12_blocks(tiny_backbone: Backbone) -> None:
    backbone = load(
        tiny_backbone.model_copy(update={"arguments": {**tiny_backbone.arguments, "depth": 12}})
    )
    adapters = [
        tensor
        for tensor in plan(backbone, Recipe(lora=Lora(rank=1)), CLASSES)
        if tensor.part == "adapters"
    ]
    assert [tensor.shape for tensor in adapters] == [(1, 64), (64, 1)] * 24


@pytest.mark.parametrize("targets", [("q", "q"), ("qkv", "v"), ()])
def test_rows_are_named_once(targets: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError):
        Lora(targets=targets)


# --- head, slots, dropout -------------------------------------------------------------------------


def test_a_head_without_bias_is_a_matrix_product(tiny_backbone: Backbone) -> None:
    backbone = load(tiny_backbone)
    model, values = moved(backbone, Recipe(head=Head(bits=1, bias=False)))
    assert set(values) == {"head.weight"}
    assert len(values["head.weight"].unique()) == 2
    x = draw(2, 64)
    model(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(model.head(x), x @ values["head.weight"].T)


def test_two_methods_on_one_slot_are_refused_in_words() -> None:
    with pytest.raises(
        ValidationError,
        match=(
            "smoa and adapter are both in parallel to the MLP; leave one out, or place one"
            " elsewhere"
        ),
    ):
        Recipe(smoa=Smoa(), adapter=Adapter())
    Recipe(smoa=Smoa(), adapter=Adapter(placement="after_attention"))


@for_every(
    ("recipe", "message"),
    [
        (
            {"smoa": {"placement": "after_mlp"}, "adapter": {"placement": "after_both"}},
            "smoa and adapter are both after the MLP",
        ),
        ({"ssf": {}, "norms": {}}, "ssf scales and shifts what biases and norms would change"),
        ({"prompts": {}, "smoa": {"prompt_generator": True}}, "both append tokens"),
        (
            {"full": {}, "biases": {}, "lora": {}},
            "full trains everything that biases and lora would change",
        ),
        (
            {"lora": {"bits": 32}, "head": {"bits": 16}, "quantiser": {}},
            "quantiser would change nothing",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_refused_in_words(
    recipe: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(recipe)


def test_a_search_cannot_bring_them_together_either(tiny_task: Task) -> None:
    content = {
        **tiny_task.model_dump(mode="json"),
        "recipe": {"adapter": {}},
        "search": {"experts": [0, 4]},
    }
    with pytest.raises(
        ValidationError, match="at experts 4: smoa and adapter are both in parallel to the MLP"
    ):
        Task.model_validate(content)


def test_a_width_counts_as_loras_rank() -> None:
    recipe = SearchSpace(width=(5,), adapter_bits=(3,), scale=(10.0,)).recipe(
        Recipe(lora=Lora(), adapter=Adapter()), {"width": 5, "adapter_bits": 3}
    )
    assert recipe.lora is not None
    assert recipe.adapter is not None
    assert (recipe.lora.rank, recipe.adapter.width, recipe.lora.bits, recipe.adapter.bits) == (
        5,
        5,
        3,
        3,
    )


def test_dropout_draws_from_its_seed_alone_and_in_training_only() -> None:
    x, state = torch.ones(4000), torch.get_rng_state()
    first, again, other = (SeededDropout(0.1, seed)(x) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.08 < float((first == 0).float().mean()) < 0.12
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 1 / 0.9]))
    assert torch.equal(SeededDropout(0.1, 1).eval()(x), x)


def test_an_adapters_dropout_acts_in_training_only(tiny_backbone: Backbone) -> None:
    recipe = Recipe(adapter=Adapter(dropout=0.5, bits=32), lora=Lora(dropout=0.5, bits=32))
    model, _ = moved(load(tiny_backbone), recipe)
    x = torch.randint(
        0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        quiet = model(x)
        assert torch.equal(model(x), quiet)
        model.train()
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), quiet)
