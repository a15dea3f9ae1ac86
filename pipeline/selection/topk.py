"""The K strongest input connections of each neuron, in order; equal ones in order of their column.

K passes of a maximum over rows, each pass hiding what it found. A maximum, unlike a partial sort, is promised to name the first of equal columns, and
over a block of rows that stays in the processor's cache it costs less than reading the sums: for the few connections that tasks use, less in all
than one partial sort.
"""

from __future__ import annotations

import torch

BLOCK_ENTRIES = 1 << 16
"""Importances ranked at a time, in float32: 256 KiB."""
_HIDDEN = -1.0


def top_connections(sums_OI: torch.Tensor, top_k: int) -> torch.Tensor:
    """Columns [O, min(K, I)] (int32) of the largest |sum| in every row, compared in float32, strongest first, ties to the lowest index."""
    columns = sums_OI.shape[1]
    blocks = sums_OI.split(max(1, BLOCK_ENTRIES // columns))
    return torch.cat([_strongest(block_RI, min(top_k, columns)) for block_RI in blocks])


def _strongest(sums_RI: torch.Tensor, kept: int) -> torch.Tensor:
    importance_RI = sums_RI.to(torch.float32, copy=True).abs_()
    columns_KR1 = []
    for _ in range(kept):
        columns_KR1.append(importance_RI.max(dim=1, keepdim=True).indices)
        importance_RI.scatter_(1, columns_KR1[-1], _HIDDEN)
    return torch.cat(columns_KR1, dim=1).int()
