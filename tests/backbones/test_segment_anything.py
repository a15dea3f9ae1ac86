"""SAM as a backbone: masks against transformers' SamModel on the same weights, from both layouts of
checkpoints; what is refused; and every part on a tiny one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import SamConfig, SamModel

from pipeline.adaptation import SelectedIndex, attach
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.errors import BackboneError
from pipeline.specs import Backbone, Input, Recipe
from pipeline.testing import check_part, check_refused

SIDE, PATCH, WIDTH, NECK = 64, 8, 48, 32
ARGUMENTS: dict[str, Any] = {
    "img_size": SIDE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": 2,
    "num_heads": 2,
    "window_size": 3,
    "global_attn_indexes": [1],
    "neck_chans": NECK,
}
META = (
    (r"^vision_encoder\.", "image_encoder."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"^image_encoder\.layers\.", "image_encoder.blocks."),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.layer_norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.layer_norm2", "neck.3"),
    (r"layer_norm_final_attn", "norm_final_attn"),
    (r"(blocks|layers)\.(\d+)\.layer_norm", r"\1.\2.norm"),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"(mlps\.\d+|head)\.layers\.0", r"\1.layers.1"),
    (r"(mlps\.\d+|head)\.proj_in", r"\1.layers.0"),
    (r"(mlps\.\d+|head)\.proj_out", r"\1.layers.2"),
    (
        r"^shared_image_embedding\.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
)
"""The names of Meta's code for those of transformers, in order."""


@pytest.fixture(scope="module")
def original() -> SamModel:
    """transformers' SAM, tiny, with random weights."""
    config = SamConfig(
        vision_config={
            "hidden_size": WIDTH,
            "output_channels": NECK,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "window_size": 3,
            "global_attn_indexes": [1],
            "mlp_dim": 4 * WIDTH,
            "num_pos_feats": NECK // 2,
        },
        prompt_encoder_config={"hidden_size": NECK, "image_size": SIDE, "patch_size": PATCH},
        mask_decoder_config={"hidden_size": NECK, "mlp_dim": 8 * NECK, "iou_head_hidden_dim": 8},
    )
    model, generator = SamModel(config).eval(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def checkpoints(original: SamModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The weights of `original` in both layouts."""
    folder = tmp_path_factory.mktemp("sam")
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    meta = {}
    for name, tensor in state.items():
        for pattern, replacement in META:
            name = re.sub(pattern, replacement, name)
        meta[name] = tensor
    files = {
        "transformers": folder / "transformers.safetensors",
        "meta": folder / "meta.safetensors",
    }
    save_file(state, files["transformers"])
    save_file(meta, files["meta"])
    return files


def load(weights: str | Path = "random", model: str = "sam_base_patch16") -> LoadedBackbone:
    spec = Backbone(model=model, arguments=ARGUMENTS, weights=str(weights))
    return load_backbone(spec, Input(size_px=SIDE), gives_maps=True)


@pytest.mark.parametrize("layout", ["transformers", "meta"])
def test_masks_are_those_of_transformers(
    layout: str, original: SamModel, checkpoints: dict[str, Path]
) -> None:
    backbone = load(checkpoints[layout])
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original(pixel_values=pixels, multimask_output=False).pred_masks[:, :, 0]
        found = backbone.model(pixels)
    assert found.shape == (2, 1, SIDE // 2, SIDE // 2)
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (backbone.width, backbone.has_decoder) == (NECK, True)


@pytest.mark.parametrize("layout", ["transformers", "meta"])
def test_the_encoder_alone_reads_the_same_checkpoints(
    layout: str, original: SamModel, checkpoints: dict[str, Path]
) -> None:
    backbone = load(checkpoints[layout], "samvit_base_patch16")
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original.get_image_embeddings(pixels)
        found = backbone.model(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_both_layouts_are_one_backbone(checkpoints: dict[str, Path]) -> None:
    prints = {load(path).fingerprint for path in checkpoints.values()}
    assert len(prints) == 1
    assert prints != {load().fingerprint}


def test_a_class_token_without_a_change_makes_the_mask_of_one_that_is_added() -> None:
    """Against the formula: tokens attend to each other, so C equal tokens make C equal masks."""
    backbone = load()
    recipe = Recipe.model_validate({"head": {"bits": 32}})
    model = attach(backbone, recipe, 3, seed=1)
    pixels = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    values = list(model.values.parameters())
    with torch.no_grad():
        for value in values:
            value.zero_()
        logits = model(pixels)
        torch.testing.assert_close(logits, logits[:, :1].expand_as(logits))
        values[0][: backbone.width] = 1.0
        changed = model(pixels)
    assert changed.shape == (2, 3, SIDE, SIDE)
    assert float((changed[:, 0] - changed[:, 1]).abs().max()) > 1e-3, "tokens make their own masks"


PARTS: dict[str, dict[str, Any]] = {
    "the tokens alone": {},
    "tokens on a subspace": {"head": {"bits": 2, "rank": 8, "bias": False}},
    "GPS with its decoder": {"connections": {"top_k": 1}, "biases": {}, "decoder": {"bits": 8}},
    "GPS everywhere": {"connections": {"top_k": 2}, "biases": {}},
    "house": {"connections": {}, "biases": {}, "smoa": {"experts": 2, "width": 4}, "norms": {}},
    "all norms": {"norms": {"which": "all"}},
    "ssf": {"ssf": {}},
    "adapter": {"adapter": {"width": 4, "bits": 1}},
    "lora in encoder and decoder": {"lora": {"rank": 2, "targets": ["q", "v", "q_proj", "v_proj"]}},
    "the decoder after a frozen encoder": {"decoder": {"bits": 4}, "from_block": 2},
    "full": {"full": {"bits": 16}},
}


SLOW = ("GPS with its decoder", "GPS everywhere", "house", "all norms", "ssf", "adapter", "full")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PARTS]
)
def test_a_part_keeps_its_promises(
    name: str, random_selection: Callable[..., SelectedIndex]
) -> None:
    backbone = load()
    check_part(Recipe.model_validate(PARTS[name]), backbone, selected=random_selection(backbone, 4))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BackboneError, match="give its encoder alone, samvit_base_patch16"):
        load_backbone(
            Backbone(model="sam_base_patch16", arguments=ARGUMENTS, weights="random"),
            Input(size_px=SIDE),
        )
    encoder = load(model="samvit_base_patch16")
    message = check_refused(Recipe.model_validate({"decoder": {}}), encoder)
    assert "it needs a backbone with a mask decoder, such as sam_base_patch16" in message
    with pytest.raises(BackboneError, match="give the path of a safetensors checkpoint"):
        load("pretrained")
    with pytest.raises(ValueError, match="full trains everything that decoder would change"):
        Recipe.model_validate({"full": {}, "decoder": {}})
