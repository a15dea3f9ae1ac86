"""The classifiers of dense tasks: a linear layer at each place of a map, a small decoder of several
maps, or a token per class that a mask decoder makes a mask of. Logits are interpolated to the size
of the input.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from pipeline.adaptation.head import LinearHead
from pipeline.adaptation.watched import learnt_once
from pipeline.backbones import LoadedBackbone, SegmentAnything, give_several_maps
from pipeline.specs import Head


class MapHead(LinearHead):
    """A linear layer on the feature of each place: maps [B, D, h, w] to logits [B, C, S, S],
    interpolated bilinearly (the linear protocol of DINOv2, arXiv 2304.07193).
    """

    def __init__(self, width: int, size_px: int, rank: int | None = None) -> None:
        super().__init__(width, rank)
        self.size_px = size_px

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits = super().forward(features.movedim(1, -1)).movedim(-1, 1)
        return self.interpolated(logits)

    def interpolated(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, C, h, w] at the size of the input."""
        size = (self.size_px, self.size_px)
        return functional.interpolate(logits, size, mode="bilinear", align_corners=False)


class FuseHead(MapHead):
    """A small decoder of several maps, joined [B, sum D_k, h, w], to logits [B, C, S, S]:

    y = relu(R x)              R [W, sum D_k], or [W, rank] of a subspace
    y = y + M * y              M [W, 9]: a 3x3 convolution of each channel by itself
    logits = W y + b           W [C, W]
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = features.movedim(1, -1)
        if self.projection_RD is not None:
            x = functional.linear(x, self.projection_RD)
        y = functional.relu(functional.linear(x, self.current["reduce"])).movedim(-1, 1)
        kernels = self.current["mix"].view(-1, 1, 3, 3)
        y = y + functional.conv2d(y, kernels, padding=1, groups=len(kernels))
        y = functional.linear(y.movedim(1, -1), self.current["weight"], self.current.get("bias"))
        return self.interpolated(y.movedim(-1, 1))


class TokenHead(MapHead):
    """The class tokens of a mask decoder: their changes are the weight [C, D], and each mask has a
    bias. Takes the decoder's masks [B, C, h, w].
    """

    def tokens(self) -> torch.Tensor:
        """What the decoder adds to its mask token, [C, D]."""
        return self.plain_tensors()["weight"]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        bias_C = self.current.get("bias")
        masks = features if bias_C is None else features + bias_C[:, None, None]
        return self.interpolated(masks)


FUSED_MAPS = 4


@learnt_once
@torch.no_grad()
def fused_width(backbone: LoadedBackbone) -> int:
    """The width of all maps that a FuseHead reads, together."""
    network = backbone.fresh_model()
    give_several_maps(network, FUSED_MAPS)
    device = next(network.parameters()).device
    image = torch.zeros(1, 3, backbone.size_px, backbone.size_px, device=device)
    return int(network(image).shape[1])


def make_head(backbone: LoadedBackbone, network: nn.Module, spec: Head) -> LinearHead:
    """The head for what `network`, a fresh model of a backbone, gives. A mask decoder in it gets
    its class tokens from the head, and a FuseHead makes it give several maps.
    """
    rank = spec.rank
    if spec.fuse is not None:
        give_several_maps(network, FUSED_MAPS)
        return FuseHead(fused_width(backbone), backbone.size_px, rank)
    if isinstance(network, SegmentAnything):
        head = TokenHead(backbone.width, backbone.size_px, rank)
        network.decoder.class_tokens = head.tokens
        return head
    if backbone.gives_maps:
        return MapHead(backbone.width, backbone.size_px, rank)
    return LinearHead(backbone.width, rank)
