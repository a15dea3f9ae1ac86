"""Stochastic depth: in training, each block's branches are left out for some of the samples (arXiv
1603.09382).

    x + b(x) / (1 - r)    with probability 1 - r, else x        for each sample and branch

The rate r rises linearly over the blocks, from 0 to the rate given, as timm's drop path does. An
adapter parallel to the MLP is not left out, as in Binary Adapter's code; one that follows a branch
is left out with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from pipeline.adaptation.blocks import MlpSlot
from pipeline.adaptation.branch_ends import BranchEnd
from pipeline.adaptation.dropout import SeededDropout
from pipeline.errors import BackboneError


class SeededDropPath(SeededDropout):
    """Zeroes whole samples of a branch in training and scales the others up; one instance serves
    all branches of a model.
    """

    def drop(self, x: torch.Tensor, rate: float) -> torch.Tensor:
        """`x` [B, ...] with a fraction `rate` of its samples dropped."""
        if not self.training or not rate:
            return x
        kept = torch.empty(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * kept.bernoulli_(1 - rate, generator=self.generator(x.device)).div_(1 - rate)


def drop_rates(rate: float, blocks: int) -> list[float]:
    """The rate of each block."""
    return [rate * number / max(blocks - 1, 1) for number in range(blocks)]


def attach_drop_path(
    model: nn.Module, slots: Sequence[MlpSlot], rate: float, seed: int
) -> SeededDropPath:
    """Hook drop path into every branch whose end is known. Raises BackboneError where there is
    none.
    """
    drop_path, has_branch = SeededDropPath(rate, seed), False
    for slot, block_rate in zip(slots, drop_rates(rate, len(slots)), strict=True):
        for branch in (slot.attention, slot.mlp):
            if branch is not None:
                BranchEnd(
                    model.get_submodule(slot.block),
                    branch,
                    partial(drop_path.drop, rate=block_rate),
                )
                has_branch = True
    if not has_branch:
        raise BackboneError(
            f"recipe.training.drop_path: given {rate:g}; {type(model).__name__} has no block whose"
            " branches are known; leave it out"
        )
    return drop_path
