"""A timm model that gives its last feature map instead of a pooled feature, for dense tasks; or
several maps of different depths, at the size of the largest and one below the other.

Layers behind that map, such as a convolution before the pooling, are removed as timm removes them
for `features_only`, so that no part trains what computes nothing. Tensors keep their names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import BackboneError


class _GivesMaps:
    """The `forward` of a model that gives maps: the last one, or those of `map_indices`."""

    map_indices: int | list[int] = 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        model: Any = self
        maps: list[torch.Tensor] = model.forward_intermediates(
            images,
            indices=self.map_indices,
            norm=hasattr(model, "norm") or hasattr(model, "neck"),
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return maps[0] if len(maps) == 1 else _joined(maps)


def _joined(maps: list[torch.Tensor]) -> torch.Tensor:
    """Maps [B, D_k, h_k, w_k], interpolated to the largest: [B, sum D_k, h, w]."""
    size = max((each.shape[2:] for each in maps), key=math.prod)
    same_size = [
        functional.interpolate(each, size, mode="bilinear", align_corners=False) for each in maps
    ]
    return torch.cat(same_size, dim=1)


def give_several_maps(model: nn.Module, count: int) -> None:
    """Make a model that gives maps give `count` of them, at even distances up to the last: of a
    pyramid, its last stages. Fewer, if there are no more.
    """
    timm_model: Any = model
    available = len(timm_model.feature_info)
    count = min(count, available)
    timm_model.map_indices = [
        math.ceil((number + 1) * available / count) - 1 for number in range(count)
    ]


def give_maps(model: nn.Module, name: str) -> None:
    """Make `model` give maps [B, D, h, w]. Raises BackboneError where timm cannot."""
    timm_model: Any = model
    own = type(model)
    if not hasattr(own, "forward_intermediates"):
        raise BackboneError(
            f"backbone.model: given {name}, which gives no feature maps (timm's {own.__name__} has"
            " no forward_intermediates); choose another backbone for segmentation"
        )
    # The neck of SAM's encoder is part of its map; timm would remove it with the head.
    has_neck = hasattr(model, "neck")
    timm_model.prune_intermediate_layers(1, prune_norm=False, prune_head=not has_neck)
    model.__class__ = type(own.__name__, (_GivesMaps, own), {})
