"""SAM as a backbone: timm's encoder with SAM's mask decoder, as models of timm's registry.

timm has the encoder alone (`samvit_base_patch16`, ...). `sam_base_patch16`, `sam_large_patch16` and
`sam_huge_patch16` have the mask decoder as the child `decoder`, without the prompt encoder.
Checkpoints in Meta's layout and in that of transformers are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from pipeline.backbones.mask_decoder import MaskDecoder

State = Mapping[str, torch.Tensor]


class SegmentAnything(VisionTransformerSAM):
    """SAM without prompts: images [B, 3, S, S] to masks [B, C, S / 4, S / 4], see MaskDecoder."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.decoder = MaskDecoder(self.num_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        masks: torch.Tensor = self.decoder(self.forward_features(x))
        return masks


_TRANSFORMERS = (
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^(image_encoder\.blocks\.\d+)\.layer_norm", r"\1.norm"),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.layer_norm", r"\1.norm"),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.upscale_conv1\.", ".output_upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
    (r"\.upscale_conv2\.", ".output_upscaling.3."),
    (r"(\.output_hypernetworks_mlps\.\d+)\.layers\.0\.", r"\1.layers.1."),
    (r"(\.output_hypernetworks_mlps\.\d+)\.proj_in\.", r"\1.layers.0."),
    (r"(\.output_hypernetworks_mlps\.\d+)\.proj_out\.", r"\1.layers.2."),
    (
        r"^shared_image_embedding\.positional_embedding$",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
)
_META = (
    (r"^image_encoder\.(.*)mlp\.lin", r"\1mlp.fc"),
    (r"^image_encoder\.", ""),
    (r"^mask_decoder\.output_hypernetworks_mlps\.0\.", "decoder.hypernetwork."),
    (r"^mask_decoder\.", "decoder."),
    (r"^prompt_encoder\.no_mask_embed\.", "decoder.no_mask_embed."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "decoder.positions"),
)
_UNUSED = ("prompt_encoder.", "decoder.output_hypernetworks_mlps.", "decoder.iou_prediction_head.")
"""What serves prompts, further masks per prompt, and the estimate of a mask's IoU."""


def in_meta_layout(state: State) -> dict[str, torch.Tensor]:
    """A checkpoint of transformers' SamModel under Meta's names; any other as it is."""
    is_of_transformers = "vision_encoder.patch_embed.projection.weight" in state
    return _renamed(state, _TRANSFORMERS) if is_of_transformers else dict(state)


def from_meta_layout(state: State, model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint of SAM under the names of SegmentAnything, without what that leaves out."""
    renamed = _renamed(state, _META)
    return {name: each for name, each in renamed.items() if not name.startswith(_UNUSED)}


def _renamed(state: State, rules: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


_CFG = {
    "num_classes": 0,
    "input_size": (3, 1024, 1024),
    "fixed_input_size": True,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "classifier": "head.fc",
}
default_cfgs = generate_default_cfgs(
    {name: dict(_CFG) for name in ("sam_base_patch16", "sam_large_patch16", "sam_huge_patch16")}
)


def _build(
    name: str,
    is_pretrained: bool,
    width: int,
    heads: int,
    last_of_group: tuple[int, ...],
    arguments: dict[str, Any],
) -> SegmentAnything:
    """A model whose blocks `last_of_group` attend to the whole image, the others to windows."""
    of_size = {"embed_dim": width, "num_heads": heads, "depth": last_of_group[-1] + 1}
    common = {
        "img_size": 1024,
        "use_rel_pos": True,
        "global_attn_indexes": last_of_group,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    return build_model_with_cfg(  # type: ignore[no-any-return]
        SegmentAnything,
        name,
        is_pretrained,
        pretrained_filter_fn=from_meta_layout,
        **{**common, **of_size, **arguments},
    )


@register_model
def sam_base_patch16(pretrained: bool = False, **kwargs: Any) -> SegmentAnything:
    """SAM of the encoder ViT-B."""
    return _build("sam_base_patch16", pretrained, 768, 12, (2, 5, 8, 11), kwargs)


@register_model
def sam_large_patch16(pretrained: bool = False, **kwargs: Any) -> SegmentAnything:
    """SAM of the encoder ViT-L."""
    return _build("sam_large_patch16", pretrained, 1024, 16, (5, 11, 17, 23), kwargs)


@register_model
def sam_huge_patch16(pretrained: bool = False, **kwargs: Any) -> SegmentAnything:
    """SAM of the encoder ViT-H."""
    return _build("sam_huge_patch16", pretrained, 1280, 16, (7, 15, 23, 31), kwargs)
