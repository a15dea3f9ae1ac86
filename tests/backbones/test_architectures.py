"""Every timm family that people use, tiny and with random weights, in every recipe: it runs, or one
line says which part has no place.

"Runs" is that of benchmarks/architectures.py: the planned size, training steps with finite
gradients, the pack as bytes and back, equal logits.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers_backbones import SWIN
from helpers_paths import PROJECT_ROOT

from pipeline.backbones import load_backbone
from pipeline.errors import BackboneError
from pipeline.specs import Backbone, Input
from pipeline.utils.devices import has_bf16_units

BENCHMARKS = PROJECT_ROOT / "benchmarks"
STAGES = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
VIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
PYRAMID = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]}

FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT": ("vit_tiny_patch16_224", VIT, 32),
    "ViT, norms after the branches": ("vit_relpos_small_patch16_rpn_224", VIT, 32),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", VIT, 32),
    "EVA-02": ("eva02_tiny_patch14_224", {**VIT, "img_size": 28}, 28),
    "EVA, norms after the branches": (
        "eva_giant_patch14_224",
        {**VIT, "img_size": 28, "mlp_ratio": 2.0, "use_post_norm": True},
        28,
    ),
    "BEiT": ("beit_base_patch16_224", VIT, 32),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {**VIT, "img_size": 28}, 28),
    "DINOv3": ("vit_small_patch16_dinov3", VIT, 32),
    "SigLIP": ("vit_base_patch16_siglip_224", VIT, 32),
    "CLIP": ("vit_base_patch16_clip_224", VIT, 32),
    "SAM": ("samvit_base_patch16_224", VIT, 32),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, 32),
    "SwinV2": ("swinv2_tiny_window8_256", SWIN, 32),
    "SwinV2-CR": ("swinv2_cr_tiny_224", SWIN, 32),
    "ConvNeXt": ("convnext_tiny", STAGES, 32),
    "ConvNeXt, padded 'same'": ("convnext_atto", {**STAGES, "output_stride": 8}, 32),
    "ConvNeXtV2": ("convnextv2_atto", STAGES, 32),
    "ResNet": ("test_resnet", {}, 64),
    "EfficientNet": ("test_efficientnet", {}, 64),
    "RegNet": ("regnety_002", {}, 32),
    "MobileNetV3": ("mobilenetv3_small_050", {}, 32),
    "MobileNetV4": ("mobilenetv4_conv_small_035", {}, 32),
    "MaxViT": ("test_maxvit", {"img_size": 64}, 64),
    "CoAtNet": ("test_coatnet", {"img_size": 64}, 64),
    "CaiT": ("cait_xxs24_224", {**VIT, "depth_token_only": 1}, 32),
    "XCiT": ("xcit_nano_12_p16_224", VIT, 32),
    "Hiera": (
        "hiera_tiny_224",
        {"img_size": [64, 64], "embed_dim": 16, "stages": [1, 1, 2, 1]},
        64,
    ),
    "MViT": ("mvitv2_tiny", {"img_size": 32}, 32),
    "PVT": ("pvt_v2_b0", {**PYRAMID, "num_heads": [1, 2, 2, 4]}, 32),
    "FastViT": ("fastvit_t8", {"layers": [1, 1, 1, 1]}, 64),
    "TinyViT": (
        "tiny_vit_5m_224",
        {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_heads": [1, 1, 2, 2]},
        224,
    ),
    "LeViT": (
        "levit_128s",
        {
            "img_size": 64,
            "embed_dim": [16, 24, 32],
            "key_dim": 8,
            "num_heads": [1, 2, 2],
            "depth": [1, 1, 1],
        },
        64,
    ),
    "DaViT": (
        "davit_tiny",
        {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_heads": [1, 2, 2, 2]},
        32,
    ),
    "ConViT": ("convit_tiny", {**VIT, "num_heads": 4, "local_up_to_layer": 1}, 32),
    "EdgeNeXt": ("edgenext_xx_small", {"depths": [2, 2, 2, 2], "dims": [8, 16, 24, 32]}, 64),
    "NextViT": ("nextvit_small", {"depths": [1, 1, 5, 1]}, 32),
    "ViTamin": ("vitamin_small_224", {"img_size": 64, "depth": 1, "num_heads": 2}, 64),
}

NO_TOKENS = {
    "prompts": "expected a VisionTransformer",
    "class_token": "expected a VisionTransformer",
}
NO_CLASS_TOKEN = {"class_token": "has no class token"}
NO_CALL = {"ssf": "without calling the layer"}
NO_ATTENTION = {"adapter after_attention": "no attention branch .*; choose parallel or after_mlp"}
NO_LORA = {"lora": "given '[qv]', which matches no layer of .*; it has "}
BY_HEAD = {"lora": "not laid out as q, k and v in thirds; name the whole layer, qkv"}
NO_BIAS = {"biases": "parameters named bias or gamma"}
NO_MLP = dict.fromkeys(
    ("smoa", "adapter parallel", "adapter after_mlp", "adapter after_attention", "dtl"),
    "next to an MLP",
)
NO_FACT = {"fact": "which matches no Linear layer of"}
UNEVEN = {"fact": "expected one to be a multiple of the other"}

REFUSED: dict[str, dict[str, str]] = {
    "ViT, norms after the branches": NO_TOKENS,
    "EVA-02": {**NO_TOKENS, **NO_CALL, **UNEVEN},
    "EVA, norms after the branches": {**NO_TOKENS, **NO_CALL},
    "BEiT": {**NO_TOKENS, **NO_CALL},
    "DINOv3": NO_TOKENS,
    "SigLIP": NO_CLASS_TOKEN,
    "SAM": {**NO_TOKENS, **NO_ATTENTION},
    "Swin": NO_TOKENS,
    "SwinV2": {**NO_TOKENS, **NO_CALL},
    "SwinV2-CR": NO_TOKENS,
    "ConvNeXt": {**NO_TOKENS, **NO_ATTENTION, **NO_LORA, **NO_FACT},
    "ConvNeXt, padded 'same'": {**NO_TOKENS, **NO_ATTENTION, **NO_LORA, **NO_FACT},
    "ConvNeXtV2": {**NO_TOKENS, **NO_ATTENTION, **NO_LORA, **NO_FACT},
    "ResNet": {**NO_TOKENS, **NO_MLP, **NO_LORA, **NO_BIAS, **NO_FACT},
    "EfficientNet": {**NO_TOKENS, **NO_MLP, **NO_LORA, **NO_FACT},
    "RegNet": {**NO_TOKENS, **NO_MLP, **NO_LORA, **NO_FACT},
    "MobileNetV3": {**NO_TOKENS, **NO_MLP, **NO_LORA, **NO_FACT},
    "MobileNetV4": {**NO_TOKENS, **NO_MLP, **NO_LORA, **NO_BIAS, **NO_FACT},
    "MaxViT": {**NO_TOKENS, **BY_HEAD},
    "CoAtNet": {**NO_TOKENS, **BY_HEAD, **NO_FACT},
    "CaiT": NO_TOKENS,
    "XCiT": NO_TOKENS,
    "Hiera": NO_TOKENS,
    "MViT": NO_TOKENS,
    "PVT": {**NO_TOKENS, **NO_LORA, **NO_FACT},
    "FastViT": {**NO_TOKENS, **NO_MLP, **NO_LORA, **NO_FACT},
    "TinyViT": {**NO_TOKENS, **NO_MLP, **BY_HEAD},
    "LeViT": {**NO_TOKENS, **NO_MLP, **NO_LORA, **NO_FACT},
    "DaViT": NO_TOKENS,
    "ConViT": NO_TOKENS,
    "EdgeNeXt": {**NO_TOKENS, **NO_ATTENTION},
    "NextViT": {**NO_TOKENS, **NO_ATTENTION},
    "ViTamin": {**NO_CLASS_TOKEN, **NO_FACT},
}
"""For each family, the recipes that it refuses, and what the line says; families that are not here
refuse none.
"""
LARGE = ("MViT", "NextViT")
"""Families that cannot be built small enough for every run of the tests."""


@pytest.fixture(scope="module")
def survey() -> Iterator[ModuleType]:
    """The script whose `outcome` tries a recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location(
            "architectures", BENCHMARKS / "architectures.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.slow if family in LARGE else ())
        for family in FAMILIES
    ],
)
def test_every_recipe_runs_or_is_refused_in_one_line(family: str, survey: ModuleType) -> None:
    name, arguments, size_px = FAMILIES[family]
    spec = Backbone(model=name, arguments=arguments, weights="random")
    backbone = load_backbone(spec, Input(size_px=size_px))
    survey.measure_batch_norms(backbone)
    expected = REFUSED.get(family, {})
    for recipe, parts in survey.RECIPES.items():
        found = survey.outcome(spec, backbone, parts)
        if recipe in expected:
            assert re.fullmatch(rf"recipe\.{next(iter(parts))}\b.*{expected[recipe]}.*", found), (
                recipe,
                found,
            )
        else:
            assert found == survey.RUNS, (recipe, found)
    # And once in the other precision.
    if has_bf16_units("cpu"):
        assert (
            survey.outcome(spec, backbone, survey.RECIPES["default"], torch.float32) == survey.RUNS
        )


def test_a_backbone_that_uses_one_tensor_twice_is_refused_in_one_line() -> None:
    """CoaT's blocks share their position encodings."""
    with pytest.raises(
        BackboneError,
        match=(
            r"^backbone\.model: given coat_lite_tiny, which uses one tensor under several names .*$"
        ),
    ):
        load_backbone(
            Backbone(model="coat_lite_tiny", arguments={"img_size": 64}, weights="random"),
            Input(size_px=64),
        )


def test_the_page_is_what_the_script_wrote(survey: ModuleType) -> None:
    result = json.loads(survey.RESULTS.read_text(encoding="utf-8"))
    assert survey.PAGE.read_text(encoding="utf-8") == survey.page(result)
    outcomes = [
        text for row in result["models"].values() for text in row.get("outcomes", {}).values()
    ]
    assert len(outcomes) > 1500
    assert not any(text.startswith(survey.CRASH) for text in outcomes)
