"""The classifier on the backbone's pooled feature, or on a fixed subspace of it.

    logits = W x + b                  W [C, D]: the whole feature
    logits = W (D / R) T_R (s * x) + b     W [C, R]: a subspace

T_R are the first R rows of the orthonormal cosine transform (DCT-II) and s is D fixed signs, which
spread every coordinate over all rows: a subsampled randomised trigonometric transform (arXiv
1011.1595, with a cosine in the place of Hadamard's matrix, so that D need be no power of two).
Both follow from D and R, so a pack stores neither. The factor D / R keeps the sum of the inputs'
magnitudes, and with it the effect of a step of Adam (see `default_learning_rate`).

Legend: C classes, D numbers of the feature, R of the subspace.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.adaptation.compact import expanded

if TYPE_CHECKING:
    from pipeline.adaptation.flat import FlatPart


def subspace(rank: int, width: int) -> torch.Tensor:
    """The projection [R, D], float32: orthogonal rows of length D / R.

    Signs come from Philox, whose stream numpy guarantees.
    """
    row_R1, column_D = (
        torch.arange(rank, dtype=torch.float64)[:, None],
        torch.arange(width, dtype=torch.float64),
    )
    cosines_RD = torch.cos(math.pi * row_R1 * (column_D + 0.5) / width) * math.sqrt(2 / width)
    cosines_RD[0] = math.sqrt(1 / width)
    is_negative_D = torch.from_numpy(np.random.Philox(0).random_raw(width) >= 1 << 63)
    return (cosines_RD.where(~is_negative_D, -cosines_RD) * (width / rank)).float()


_known_subspace = functools.lru_cache(maxsize=64)(subspace)


class LinearHead(nn.Module):
    """A linear layer; `current` holds its weight [C, D], or [C, R] of a subspace, and, where it has
    one, bias [C].
    """

    projection_RD: torch.Tensor | None

    def __init__(self, width: int, rank: int | None = None) -> None:
        super().__init__()
        self.current: dict[str, torch.Tensor] = {}
        projection_RD = None if rank is None else subspace(rank, width)
        self.register_buffer("projection_RD", projection_RD, persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.projection_RD is not None:
            features = F.linear(features, self.projection_RD)
        return F.linear(features, self.current["weight"], self.current.get("bias"))

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """State dict of a linear layer on the whole feature that computes the same."""
        if self.projection_RD is None:
            return dict(self.current)
        return {**self.current, "weight": self.current["weight"] @ self.projection_RD}


def mixed_logits(
    features_BD: torch.Tensor, heads: Sequence[FlatPart], owners: Sequence[int]
) -> list[torch.Tensor]:
    """The logits [C] of each sample by its own head, as one product with the classes of all heads
    on the same feature; `owners` says which of `heads` is a sample's.
    """
    logits: list[torch.Tensor | None] = [None] * len(owners)
    tensors = _tensors(heads)
    for rank in {head.structure.spec.rank for head in heads}:  # type: ignore[attr-defined]
        numbers = [at for at, head in enumerate(heads) if head.structure.spec.rank == rank]  # type: ignore[attr-defined]
        features = features_BD
        if rank is not None:
            projection_RD = _known_subspace(rank, features_BD.shape[1])
            features = F.linear(features, projection_RD.to(features.device))
        weights = [tensors[number]["head.weight"] for number in numbers]
        products = F.linear(features, torch.cat(weights))
        starts = dict(zip(numbers, accumulate(map(len, weights), initial=0), strict=False))
        for sample, owner in enumerate(owners):
            if owner in starts:
                own, start = tensors[owner], starts[owner]
                found = products[sample, start : start + len(own["head.weight"])]
                logits[sample] = found + own["head.bias"] if "head.bias" in own else found
    return [each for each in logits if each is not None]


def _tensors(heads: Sequence[FlatPart]) -> list[dict[str, torch.Tensor]]:
    """The tensors of each head by name."""
    values_N = expanded([head.values for head in heads])
    each = values_N.split([len(head.values) for head in heads])
    return [
        {
            name: values_N[start : start + math.prod(shape)].view(shape)
            for name, (start, shape) in head.structure.places.items()
        }
        for head, values_N in zip(heads, each, strict=True)
    ]
