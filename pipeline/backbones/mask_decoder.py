"""SAM's mask decoder without prompts (arXiv 2304.02643).

    tokens   t = [iou token, 4 mask tokens, C class tokens]           [B, T, D]
    image    m = map + no-mask embedding                              [B, h w, D]
    two-way transformer of 2 blocks: t attends to itself, then to m; an MLP; m attends to t
    masks    hypernetwork(t_c) . upscaled(m)                          [B, C, 4 h, 4 w]

The tokens are added again wherever they are queries or keys, and so are the places of the map, by
random Fourier features. The class tokens are a task's: SAM's first mask token plus a change. A
decoder without any gives the mask of the first mask token, which is what SAM gives for one mask
per prompt. What serves neither is left out: the other masks' hypernetworks and the estimate of
the IoU. Tensors have the names of Meta's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn import functional

HEADS, MASK_TOKENS, MASK_WIDTHS = 8, 4, (4, 8)
"""Heads of each attention; SAM's own mask tokens; the parts of D after each upscaling."""


class Attention(nn.Module):
    """Attention of HEADS heads, whose projections have D / `reduction` numbers."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width // reduction)
        self.k_proj = nn.Linear(width, width // reduction)
        self.v_proj = nn.Linear(width, width // reduction)
        self.out_proj = nn.Linear(width // reduction, width)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Queries [B, N, D], keys and values [B, M, D]; gives [B, N, D]."""
        q, k, v = (
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for each in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
        result: torch.Tensor = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return result


class Mlp(nn.Module):
    """Two layers with a ReLU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.lin2(functional.relu(self.lin1(x)))
        return result


class TwoWayBlock(nn.Module):
    """Tokens and image attend to each other; in the first block, tokens start as they are."""

    def __init__(self, width: int, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.self_attn = Attention(width, 1)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = Attention(width, 2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 8 * width)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = Attention(width, 2)

    def forward(
        self,
        tokens: torch.Tensor,
        image: torch.Tensor,
        token_places: torch.Tensor,
        places: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, T, D] and image [B, N, D], changed; `token_places` and `places` are added to
        what attends.
        """
        if self.is_first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_places
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        attended = self.cross_attn_token_to_image(tokens + token_places, image + places, image)
        tokens = self.norm2(tokens + attended)
        tokens = self.norm3(tokens + self.mlp(tokens))
        attended = self.cross_attn_image_to_token(image + places, tokens + token_places, tokens)
        return tokens, self.norm4(image + attended)


class TwoWayTransformer(nn.Module):
    """Two blocks, and a last look of the tokens at the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TwoWayBlock(width, number == 0) for number in range(2)])
        self.final_attn_token_to_image = Attention(width, 2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(
        self, tokens: torch.Tensor, image: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, T, D] and image [B, N, D] after all blocks; places [N, D]."""
        start = tokens
        for block in self.layers:
            tokens, image = block(tokens, image, start, places)
        attended = self.final_attn_token_to_image(tokens + start, image + places, image)
        return self.norm_final_attn(tokens + attended), image


class Hypernetwork(nn.Module):
    """Three layers that make of a token the weights of its mask."""

    def __init__(self, width: int, mask_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, mask_width)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, last = self.layers
        result: torch.Tensor = last(functional.relu(second(functional.relu(first(x)))))
        return result


class MaskDecoder(nn.Module):
    """Maps [B, D, h, w] to masks [B, C, 4 h, 4 w] of C class tokens or, without any, [B, 1, ...].

    `class_tokens` returns the changes [C, D] that make class tokens of SAM's first mask token.
    """

    positions: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.class_tokens: Callable[[], torch.Tensor] | None = None
        middle, last = (width // part for part in MASK_WIDTHS)
        self.register_buffer("positions", torch.randn(2, width // 2))
        self.no_mask_embed = nn.Embedding(1, width)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(MASK_TOKENS, width)
        self.transformer = TwoWayTransformer(width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, middle, kernel_size=2, stride=2),
            LayerNorm2d(middle),
            nn.GELU(),
            nn.ConvTranspose2d(middle, last, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.hypernetwork = Hypernetwork(width, last)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        height, width = features.shape[2:]
        tokens, first = self._tokens()
        image = (features + self.no_mask_embed.weight[0, :, None, None]).flatten(2).mT
        places = self._places(height, width)
        tokens, image = self.transformer(tokens.expand(image.shape[0], -1, -1), image, places)
        upscaled = self.output_upscaling(image.mT.unflatten(2, (height, width)))
        weights = self.hypernetwork(tokens[:, first])
        return torch.einsum("bcd,bdhw->bchw", weights, upscaled)

    def _tokens(self) -> tuple[torch.Tensor, slice]:
        """All tokens [T, D], and those of them that become masks."""
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        if self.class_tokens is None:
            return own, slice(1, 2)
        added = self.mask_tokens.weight[:1] + self.class_tokens()
        return torch.cat([own, added.to(own.dtype)]), slice(len(own), None)

    def _places(self, height: int, width: int) -> torch.Tensor:
        """Random Fourier features of the places of a map, [h w, D]."""
        y, x = (
            (torch.arange(size, device=self.positions.device) + 0.5) / size
            for size in (height, width)
        )
        places = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
        angles = 2 * math.pi * (2 * places.flatten(0, 1) - 1) @ self.positions
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
