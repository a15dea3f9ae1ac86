"""Prompts, class token, generated prompts, SSF and full fine-tuning against the papers' formulas
written out on timm's own blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_cases import for_every
from torch import nn

from pipeline.adaptation import attach, plan
from pipeline.adaptation.sites import norms_of, tunable_layers
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.errors import BackboneError
from pipeline.specs import Backbone, ClassToken, Full, Input, Norms, Prompts, Recipe, Smoa, Ssf

Values = dict[str, torch.Tensor]
AVERAGED = {"global_pool": "avg", "depth": 3}


def load(spec: Backbone, **arguments: Any) -> LoadedBackbone:
    return load_backbone(
        spec.model_copy(update={"arguments": {**spec.arguments, **arguments}}), Input(size_px=32)
    )


def moved_features(
    backbone: LoadedBackbone, recipe: Recipe, x: torch.Tensor
) -> tuple[torch.Tensor, Values]:
    """Features of normalised images once all values are large enough to matter, and the values by
    name.
    """
    model = attach(backbone, recipe, 3)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.values.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))  # hands the values to the modules
        return model.backbone(x), {
            tensor.name: value.detach() for tensor, value in model.values().items()
        }


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def through_blocks(
    vit: Any, x: torch.Tensor, run: Callable[[int, nn.Module, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """timm's forward pass with `run(number, block, tokens)` in place of each block, and what it
    appended to the 17 tokens cut off.
    """
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for number, block in enumerate(vit.blocks):
        tokens = run(number, block, tokens)
    return vit.forward_head(vit.norm(tokens[:, :17]))


@for_every("pool", ["token", "avg"])
@for_every("deep", [False, True])
def test_prompts_are_tokens_of_the_first_block_or_of_every_block(
    deep: bool, pool: str, tiny_backbone: Backbone
) -> None:
    backbone, x = load(tiny_backbone, global_pool=pool, depth=3), draw(2, 3, 32, 32)
    features, values = moved_features(
        backbone, Recipe(prompts=Prompts(count=4, deep=deep, bits=32)), x
    )
    assert sum(name.startswith("prompts.") for name in values) == (3 if deep else 1)

    def run(number: int, block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        if number == 0 or deep:  # right behind the class token, where the paper has them
            prompts = values[f"prompts.{number}"].expand(2, -1, -1)
            tokens = torch.cat(
                [tokens[:, :1], prompts, tokens[:, 1 if number == 0 else 5 :]], dim=1
            )
        tokens = block(tokens)
        return torch.cat([tokens[:, :1], tokens[:, 5:]], dim=1) if number == 2 else tokens

    torch.testing.assert_close(
        features, through_blocks(backbone.model, x, run), rtol=1e-4, atol=1e-4
    )


def test_the_class_token_starts_somewhere_else(tiny_backbone: Backbone) -> None:
    backbone, x = load(tiny_backbone), draw(2, 3, 32, 32)
    features, values = moved_features(backbone, Recipe(class_token=ClassToken(bits=32)), x)
    by_hand: Any = backbone.fresh_model()
    by_hand.cls_token = nn.Parameter(
        by_hand.cls_token + values["class_token.change"], requires_grad=False
    )
    torch.testing.assert_close(features, by_hand(x), rtol=1e-4, atol=1e-4)


def test_a_network_without_class_token_has_none_to_train(tiny_backbone: Backbone) -> None:
    backbone = load(tiny_backbone, class_token=False, global_pool="avg")
    with pytest.raises(
        BackboneError, match=r"recipe\.class_token: this VisionTransformer has no class token"
    ):
        plan(backbone, Recipe(class_token=ClassToken()), 3)


@for_every("placement", ["parallel", "after_mlp"])
@for_every("arguments", [{}, AVERAGED])
def test_generated_prompts_are_scaled_and_shifted_means_that_accumulate(
    placement: str, arguments: dict[str, Any], tiny_backbone: Backbone
) -> None:
    """One expert, so that the bank is one bottleneck."""
    backbone, x = load(tiny_backbone, **arguments), draw(2, 3, 32, 32)
    smoa = Smoa.model_validate(
        {"experts": 1, "width": 4, "bits": 32, "placement": placement, "prompt_generator": True}
    )
    features, values = moved_features(backbone, Recipe(smoa=smoa), x)
    last = len(backbone.model.blocks) - 1  # type: ignore[arg-type]
    seen = []

    def run(number: int, block: Any, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens.shape[1])
        tokens = tokens + block.attn(block.norm1(tokens))
        branch = block.mlp(block.norm2(tokens))
        read = block.norm2(tokens) if placement == "parallel" else branch
        bank = torch.relu(read @ values["smoa.64.down"][0].T) @ values["smoa.64.up"][0].T
        tokens = tokens + branch + bank
        if number == last:
            return tokens
        name = f"generator.blocks.{number}"
        prompt = (1 + values[f"{name}.scale"]) * bank.mean(dim=1) + values[f"{name}.shift"]
        return torch.cat([tokens, prompt[:, None]], dim=1)

    torch.testing.assert_close(
        features, through_blocks(backbone.model, x, run), rtol=1e-4, atol=1e-4
    )
    assert seen == list(range(17, 18 + last))


def test_one_block_has_nobody_to_generate_for(tiny_backbone: Backbone) -> None:
    with pytest.raises(
        BackboneError, match=r"recipe\.smoa\.prompt_generator: .* it needs two blocks or more"
    ):
        plan(load(tiny_backbone, depth=1), Recipe(smoa=Smoa(prompt_generator=True)), 3)


@for_every("family", ["vit", "swin", "convnext", "convnext_linear"])
def test_ssf_scales_and_shifts_every_output(family: str, families: dict[str, Backbone]) -> None:
    """The same network with the scales and shifts merged into weights and biases, as the paper
    merges them.
    """
    backbone, x = load(families[family]), draw(2, 3, 32, 32)
    features, values = moved_features(backbone, Recipe(ssf=Ssf(bits=32)), x)
    by_hand = backbone.fresh_model()
    for name in {**tunable_layers(by_hand), **norms_of(by_hand)}:
        module: Any = by_hand.get_submodule(name)
        scale, shift = 1 + values[f"ssf.{name}.scale"], values[f"ssf.{name}.shift"]
        bias = module.bias if module.bias is not None else torch.zeros(len(scale))
        module.weight = nn.Parameter(
            module.weight * scale.view(-1, *[1] * (module.weight.ndim - 1)), requires_grad=False
        )
        module.bias = nn.Parameter(bias * scale + shift, requires_grad=False)
    torch.testing.assert_close(features, by_hand(x), rtol=1e-3, atol=1e-3)


def test_ssf_refuses_blocks_that_use_a_weight_without_its_layer() -> None:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone = load(Backbone(model="beit_base_patch16_224", arguments=arguments, weights="random"))  # type: ignore[arg-type]
    with pytest.raises(
        BackboneError, match=r"recipe\.ssf: Beit's 'blocks\.0\.attn' uses the weight of its qkv"
    ):
        plan(backbone, Recipe(ssf=Ssf()), 3)


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_full_fine_tuning_changes_every_parameter(
    family: str, families: dict[str, Backbone]
) -> None:
    backbone, x = load(families[family]), draw(2, 3, 32, 32)
    features, values = moved_features(backbone, Recipe(full=Full()), x)
    by_hand = backbone.fresh_model()
    for name, parameter in by_hand.named_parameters():
        parameter.data = parameter + values[f"full.{name}"].view(parameter.shape)
    with torch.inference_mode():
        torch.testing.assert_close(features, by_hand(x), rtol=1e-4, atol=1e-4)


def test_all_norms_are_all_norms(tiny_backbone: Backbone) -> None:
    backbone = load(tiny_backbone)
    names = {
        tensor.name.rpartition(".")[0]
        for tensor in plan(backbone, Recipe(norms=Norms(which="all")), 3)
        if tensor.part == "norms"
    }
    assert names == {
        name for name, module in backbone.model.named_modules() if isinstance(module, nn.LayerNorm)
    }
    assert len(names) == 5
