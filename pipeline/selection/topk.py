"""The K strongest input connections of each neuron, in order; equal ones in order of their column."""

from __future__ import annotations

import torch


def top_connections(sums_OI: torch.Tensor, top_k: int) -> torch.Tensor:
    """Columns [O, min(K, I)] (int32) of the largest |sum| in every row, strongest first, ties to the lowest index.

    One partial sort: a non-negative float32 keeps its order when its bits are read as an integer, so importance and column fit one int64 key that
    is never equal for two columns.
    """
    columns = sums_OI.shape[1]
    importance_OI = sums_OI.abs().float().contiguous().view(torch.int32).long()
    key_OI = (importance_OI << 32) | torch.arange(columns - 1, -1, -1, device=sums_OI.device)
    kept_OK = key_OI.topk(min(top_k, columns), dim=1, sorted=True).values
    return (columns - 1 - (kept_OK & 0xFFFFFFFF)).int()
