"""Point transformers: Point-MAE's (arXiv 2203.06604) and ReCon's (arXiv 2302.02318), in timm's
registry as `point_mae` and `point_recon`.

A cloud is cut into groups, the nearest neighbours of its farthest points. A small PointNet turns
each group, relative to its centre, into a token. The embedding of the centre is added before every
block, not only the first one:

    x = block(x + pos)
    feature = [class token, maximum over the groups' tokens]

The tensors have timm's names, and layers that both projects write as 1x1 convolutions are linear
layers here, which compute the same; `official_layout` reads their checkpoints.
Legend: B clouds, N points, G groups, S points per group, C channels, T tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional

from pipeline.backbones.neighbours import farthest_points, gather_points, nearest_points

_POSITION_HIDDEN = 128
_TRAINED_ONLY = (
    "MAE_decoder",
    "mask_token",
    "decoder_pos_embed",
    "increase_dim",
    "cls_head_finetune",
    "cls_proj",
    "img_encoder",
    "img_proj",
    "text_encoder",
    "text_proj",
)
"""What the official checkpoints hold besides the encoder."""


class PatchEmbedding(nn.Module):
    """A PointNet of each group: groups [B, G, S, C] to tokens [B, G, D]."""

    def __init__(self, channels: int, hidden_dim: int, embed_dim: int) -> None:
        super().__init__()
        pooled = 2 * hidden_dim
        self.first_conv = _two_layers(channels, hidden_dim, pooled)
        self.second_conv = _two_layers(2 * pooled, 2 * pooled, embed_dim)

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        clouds, count, size, _ = groups.shape
        x = self.first_conv(groups.flatten(0, 2)).unflatten(0, (-1, size))
        pooled = x.amax(dim=1, keepdim=True).expand_as(x)
        x = self.second_conv(torch.cat([pooled, x], dim=-1).flatten(0, 1))
        tokens: torch.Tensor = x.unflatten(0, (clouds, count, size)).amax(dim=2)
        return tokens


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class PointTransformer(nn.Module):
    """Maps clouds [B, N, C] to features [B, 2 D].

    Args:
        channels: of a point: 3 coordinates, or 6 with a normal.
        num_points: of a cloud, if the task names no other number.
        hidden_dim: of the PointNet; it is four times as wide at its widest.
        modal_tokens: whether there are ReCon's tokens for image and text, too.
    """

    def __init__(
        self,
        channels: int = 3,
        num_points: int = 1024,
        num_groups: int = 64,
        group_size: int = 32,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        hidden_dim: int = 128,
        modal_tokens: bool = False,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if channels not in (3, 6):
            raise ValueError(f"channels is {channels}; expected 3, or 6 with normals")
        if num_classes:
            raise ValueError("a point transformer has no classifier; leave out num_classes")
        self.channels, self.num_points = channels, num_points
        self.num_groups, self.group_size = num_groups, group_size
        self.embed_dim, self.num_features, self.head_hidden_size = (
            embed_dim,
            embed_dim,
            2 * embed_dim,
        )
        self.encoder = PatchEmbedding(channels, hidden_dim, embed_dim)
        self.token_names = ("cls", "img", "text") if modal_tokens else ("cls",)
        for name in self.token_names:
            for what in ("token", "pos"):
                start = nn.init.trunc_normal_(torch.zeros(1, 1, embed_dim), std=0.02)
                self.register_parameter(f"{name}_{what}", nn.Parameter(start))
        self.pos_embed = nn.Sequential(
            nn.Linear(3, _POSITION_HIDDEN), nn.GELU(), nn.Linear(_POSITION_HIDDEN, embed_dim)
        )
        self.norm_pre = nn.Identity()
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        centres_BG3, groups = self.grouped(points)
        tokens = self.encoder(groups)
        x, pos = self._prefixed("token", tokens), self._prefixed("pos", self.pos_embed(centres_BG3))
        x = self.norm_pre(x)
        for block in self.blocks:
            # Tokens that a part appends have no position.
            x = block(x + functional.pad(pos, (0, 0, 0, x.shape[1] - pos.shape[1])))
        x = self.norm(x)
        return torch.cat([x[:, 0], x[:, len(self.token_names) :].amax(dim=1)], dim=-1)

    def grouped(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres [B, G, 3] and their groups [B, G, S, C], with coordinates from the centre."""
        centres = gather_points(points, farthest_points(points, self.num_groups))[..., :3]
        groups = gather_points(points, nearest_points(points, centres, self.group_size))
        offsets = groups[..., :3] - centres[:, :, None]
        return centres, torch.cat([offsets, groups[..., 3:]], dim=-1)

    def _prefixed(self, what: str, x: torch.Tensor) -> torch.Tensor:
        own = [getattr(self, f"{name}_{what}") for name in self.token_names]
        return torch.cat([each.expand(len(x), -1, -1).to(x.dtype) for each in own] + [x], dim=1)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which block a parameter belongs to, as timm's models say it."""
        return {
            "stem": r"^(?:encoder|pos_embed|\w+_token|\w+_pos)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def official_layout(state: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of Point-MAE or ReCon, pretrained or fine-tuned, under the names
    of a PointTransformer.

    Point-MAE's pretrained file has no class token: fine-tuning starts it at random. Here it is
    zero, so that every machine has the same.
    """
    found = {}
    for name, tensor in state.items():
        name = re.sub(r"^(module\.)?(MAE_encoder\.|base_model\.)?", "", name)
        name = re.sub(r"^blocks\.blocks\.", "blocks.", name)
        if name.startswith(_TRAINED_ONLY):
            continue
        is_convolution = re.match(r"encoder\..*weight$", name) and tensor.ndim == 3
        found[name] = tensor.squeeze(-1) if is_convolution else tensor
    for name in ("cls_token", "cls_pos"):
        found.setdefault(name, torch.zeros_like(model.get_parameter(name)))
    return found


_NOT_OURS = ("global_pool", "in_chans", "img_size")


def _build(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    model: nn.Module = build_model_with_cfg(
        PointTransformer,
        name,
        pretrained,
        pretrained_filter_fn=official_layout,
        kwargs_filter=_NOT_OURS,
        **arguments,
    )
    return model


default_cfgs = generate_default_cfgs(
    {name: {"classifier": (), "num_classes": 0} for name in ("point_mae", "point_recon")}
)


@register_model
def point_mae(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Point-MAE's encoder."""
    return _build("point_mae", pretrained, arguments)


@register_model
def point_recon(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ReCon's encoder, with its tokens for image and text."""
    return _build("point_recon", pretrained, {"modal_tokens": True, **arguments})
