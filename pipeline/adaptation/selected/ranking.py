"""A task's selection: for each layer the flat indices that some trial may change, each with the
smallest K that keeps it.

The level says which connections compete with each other. At every level, K keeps as many
connections as K per neuron would:

    neuron     the K strongest of each row
    layer      the K * O strongest of each layer of O rows
    network    as many as that over all layers, the strongest of the network

where K is the layer's number of columns if that is smaller. So one selection of the largest K
serves a study: a trial keeps the indices whose rank is at most its K. Levels are GPS's ablation
(arXiv 2312.10136). Shapes: O rows (neurons), I columns (inputs of a neuron), E entries that
compete, M indices that some K keeps, N indices that one K keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from pipeline.adaptation.selected.topk import top_connections, top_entries
from pipeline.errors import BackboneError
from pipeline.specs import Level


class RankedIndices(NamedTuple):
    """A layer's part of a selection: indices [M] (int32), ascending, and the smallest K that keeps
    each, [M] (uint8), from 1.

    A flat index is a number o * I + i: an entry of the weight seen as one row-major [O, I] matrix.
    """

    index_M: torch.Tensor
    rank_M: torch.Tensor

    def at(self, top_k: int) -> torch.Tensor:
        """The indices [N] (int64), ascending, that K keeps."""
        return self.index_M[self.rank_M <= top_k].long()

    def count(self, top_k: int) -> int:
        """How many indices K keeps."""
        return int((self.rank_M <= top_k).sum())

    @classmethod
    def unranked(cls, index_N: torch.Tensor) -> RankedIndices:
        """Places that every K keeps."""
        return cls(
            index_N.int(), torch.ones(len(index_N), dtype=torch.uint8, device=index_N.device)
        )


SelectedIndex = Mapping[str, RankedIndices]
"""A selection, by layer. A layer may have no indices."""


def kept_indices(selected: SelectedIndex, top_k: int) -> dict[str, torch.Tensor]:
    """The indices [N] of each layer that K keeps; layers that keep none are left out."""
    indices = {name: ranked.at(top_k) for name, ranked in selected.items()}
    return {name: index_N for name, index_N in indices.items() if len(index_N)}


def rank_indices(
    importance: Mapping[str, torch.Tensor], level: Level, top_k: int
) -> dict[str, RankedIndices]:
    """Rank the entries of each layer [O, I] by absolute value, compared in float32; equal ones by
    layer, then by index.

    Raises:
        BackboneError: a value is not a number, or infinite.
    """
    for name, values_OI in importance.items():
        if not values_OI.isfinite().all():
            raise BackboneError(
                f"selection: the importance of {name}'s connections is not finite; the backbone's"
                " features may overflow: try precision fp32"
            )
    if level == "neuron":
        return {name: _rank_rows(values_OI, top_k) for name, values_OI in importance.items()}
    groups = [[name] for name in importance] if level == "layer" else [list(importance)]
    return {
        name: indices
        for group in groups
        for name, indices in _rank_together(
            {name: importance[name] for name in group}, top_k
        ).items()
    }


def first_indices(shapes: Mapping[str, tuple[int, int]], top_k: int) -> dict[str, RankedIndices]:
    """The first K inputs of each neuron, in their order: what ranking per neuron gives where all
    entries of layers [O, I] are equal.
    """
    found = {}
    for name, (neurons, inputs) in shapes.items():
        columns = torch.arange(min(top_k, inputs))
        index_OK = torch.arange(neurons)[:, None] * inputs + columns
        found[name] = _ascending(index_OK.flatten(), (columns + 1).repeat(neurons))
    return found


def kept_at(shape_OI: tuple[int, ...], top_k: int) -> int:
    """Number of connections of a layer [O, I] at K per neuron."""
    return shape_OI[0] * min(top_k, shape_OI[1])


def _rank_rows(values_OI: torch.Tensor, top_k: int) -> RankedIndices:
    index_OK = top_connections(values_OI, top_k).cpu().long()
    rows, kept = index_OK.shape
    index_OK = torch.arange(rows)[:, None] * values_OI.shape[1] + index_OK
    return _ascending(index_OK.flatten(), torch.arange(1, kept + 1).repeat(rows))


def _rank_together(importance: Mapping[str, torch.Tensor], top_k: int) -> dict[str, RankedIndices]:
    """Rank entries of one or several layers that all compete with each other."""
    shapes = [tuple(values_OI.shape) for values_OI in importance.values()]
    kept_K = torch.tensor([sum(kept_at(shape, k) for shape in shapes) for k in range(1, top_k + 1)])
    entries = torch.cat(
        [values_OI.to(torch.float32).abs().flatten() for values_OI in importance.values()]
    )
    strongest_M = top_entries(entries, int(kept_K[-1])).cpu()
    rank_M = 1 + torch.searchsorted(kept_K, torch.arange(len(strongest_M)), right=True)
    starts = [0, *torch.tensor([rows * columns for rows, columns in shapes]).cumsum(0).tolist()]
    return dict(zip(importance, _by_layer(strongest_M, rank_M, starts), strict=True))


def _by_layer(
    strongest_M: torch.Tensor, rank_M: torch.Tensor, starts: Sequence[int]
) -> list[RankedIndices]:
    layers = []
    for start, end in itertools.pairwise(starts):
        inside_M = (strongest_M >= start) & (strongest_M < end)
        layers.append(_ascending(strongest_M[inside_M] - start, rank_M[inside_M]))
    return layers


def _ascending(index_M: torch.Tensor, rank_M: torch.Tensor) -> RankedIndices:
    sorted_M = index_M.sort()
    return RankedIndices(sorted_M.values.int(), rank_M[sorted_M.indices].to(torch.uint8))
