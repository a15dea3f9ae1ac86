"""The strongest connections, in order; ties in order of their flat index.

Per neuron: K passes of an argmax over rows, each pass masking what it found. Unlike a partial
sort, argmax is guaranteed to return the first of equal columns, and over a block of rows that
stays in the processor's cache numpy's costs a third of reading the sums: for the few connections
that tasks use, less in all than one partial sort. (Torch's argmax does not use vector
instructions on CPU and takes six times as long.)

Per layer or network: a partial sort gives the weakest value that is kept. Larger values are kept,
and the first of those equal to it.
"""

from __future__ import annotations

import torch

BLOCK_ENTRIES = 1 << 18
"""Importances ranked at a time, in float32: 1 MiB."""
_HIDDEN = -1.0


def top_connections(sums_OI: torch.Tensor, top_k: int) -> torch.Tensor:
    """Columns [O, min(K, I)] (int32) of the largest |sum| in every row, compared in float32,
    strongest first, ties to the lowest index.
    """
    columns = sums_OI.shape[1]
    blocks = sums_OI.split(max(1, BLOCK_ENTRIES // columns))
    return torch.cat([_strongest(block_RI, min(top_k, columns)) for block_RI in blocks])


def _strongest(sums_RI: torch.Tensor, kept: int) -> torch.Tensor:
    importance_RI = sums_RI.to(torch.float32, copy=True).abs_()
    columns_KR1: list[torch.Tensor] = []
    for rank in range(kept):
        if rank:
            importance_RI.scatter_(1, columns_KR1[-1], _HIDDEN)
        columns_KR1.append(_first_largest(importance_RI))
    return torch.cat(columns_KR1, dim=1).int()


def _first_largest(importance_RI: torch.Tensor) -> torch.Tensor:
    """Column [R, 1] (int64) of each row's maximum, the first of equal ones."""
    if importance_RI.is_cpu:
        return torch.from_numpy(importance_RI.numpy().argmax(axis=1, keepdims=True))
    return importance_RI.max(dim=1, keepdim=True).indices


def top_entries(importance_E: torch.Tensor, count: int) -> torch.Tensor:
    """Places [count] (int64) of the largest entries, none of them negative, strongest first, ties
    to the lowest index.
    """
    weakest = importance_E.topk(count, sorted=False).values.min()
    above_A = (importance_E > weakest).nonzero()[:, 0]
    equal = (importance_E == weakest).nonzero()[: count - len(above_A), 0]
    return torch.cat(
        [above_A[importance_E[above_A].sort(descending=True, stable=True).indices], equal]
    )
