"""Packs in memory: the numbers of each part as one flat array, in as few bytes as hold them without
rounding, so that thousands stay resident.

Names, shapes and settings are kept once for all packs that have the same (`Structure`). Legend: N
values of a part of a pack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.adaptation.compact import Compact, compacted
from pipeline.adaptation.part import PARTS
from pipeline.adaptation.selected.ranking import kept_indices
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.adaptation.unpacking import DecodedPack
from pipeline.packs import PackMetadata
from pipeline.specs.section import Spec

_TRAINING_ONLY = {"bits", "dropout", "balance_weight"}
"""Settings of a part that a reloaded pack does not compute with."""


@dataclass(frozen=True, eq=False)
class Structure:
    """What the values of a part are: its settings, and for each tensor where it starts among the
    values, and its shape. There is one object per structure.

    `from_block` is the first block that the pack changes. `is_per_neuron`: of connections, whether
    all neurons of a layer have the same number of them, in every layer.
    """

    spec: Spec
    from_block: int
    is_per_neuron: bool
    places: Mapping[str, tuple[int, tuple[int, ...]]]


@dataclass(frozen=True, eq=False)
class FlatPart:
    """A part's values, and for connections where each is: its index into its layer's weight or, of
    a part that is per neuron, its column of that weight as a matrix.
    """

    structure: Structure
    values: Compact
    index_N: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory."""
        return self.values.nbytes + (0 if self.index_N is None else self.index_N.nbytes)


@dataclass(frozen=True, eq=False)
class FlatPack:
    """A pack's parts by their names in a recipe, its `head` among them."""

    metadata: PackMetadata
    parts: Mapping[str, FlatPart]

    @property
    def from_block(self) -> int:
        """The first block that the pack changes."""
        return next(iter(self.parts.values())).structure.from_block

    @property
    def size_bytes(self) -> int:
        """Memory of the values, the indices and the description."""
        arrays = sum(part.nbytes for part in self.parts.values())
        return arrays + len(self.metadata.to_json())


def flatten(decoded: DecodedPack, device: str | torch.device = "cpu") -> FlatPack:
    """A decoded pack as flat arrays on a device."""
    parts = {}
    for name, tensors in decoded.parts.items():
        spec: Any = decoded.recipe.head if name == "head" else PARTS[name].spec(decoded.recipe)
        values_N = torch.cat([decoded.values[tensor].reshape(-1) for tensor in tensors])
        index_N, is_per_neuron = None, False
        if name == "connections":
            assert decoded.selected is not None
            kept = kept_indices(decoded.selected, spec.top_k)
            is_per_neuron = all(_is_per_neuron(kept[tensor.name], tensor) for tensor in tensors)
            index_N = _indices(kept, tensors, is_per_neuron).to(device)
        named_shapes = tuple((tensor.name, tensor.shape) for tensor in tensors)
        structure = _structure(
            type(spec),  # type: ignore[arg-type]
            spec.model_dump_json(exclude=_TRAINING_ONLY),
            decoded.recipe.from_block or 0,
            is_per_neuron,
            named_shapes,
        )
        parts[name] = FlatPart(structure, compacted(values_N).to(device), index_N)
    return FlatPack(decoded.metadata, parts)


def _is_per_neuron(index_N: torch.Tensor, tensor: PlannedTensor) -> bool:
    """Whether ascending indices into a layer's weight are equally many in each of its rows."""
    assert tensor.layer is not None
    neurons, inputs = tensor.layer
    rows_N = torch.arange(neurons).repeat_interleave(len(index_N) // neurons)
    return torch.equal(index_N // inputs, rows_N)


def _indices(
    kept: Mapping[str, torch.Tensor], tensors: Sequence[PlannedTensor], is_per_neuron: bool
) -> torch.Tensor:
    """Where the connections of a pack are, layer by layer: columns, if all inputs can be numbered
    in 16 bits.
    """
    if not is_per_neuron:
        return torch.cat([kept[tensor.name].int() for tensor in tensors])
    inputs = {tensor.name: tensor.layer[1] for tensor in tensors if tensor.layer is not None}
    dtype = torch.int16 if max(inputs.values()) <= 1 << 15 else torch.int32
    return torch.cat([(kept[name] % count).to(dtype) for name, count in inputs.items()])


@functools.lru_cache(maxsize=4096)
def _structure(
    section: type[Spec],
    settings: str,
    from_block: int,
    is_per_neuron: bool,
    named_shapes: tuple[tuple[str, tuple[int, ...]], ...],
) -> Structure:
    places, start = {}, 0
    for name, shape in named_shapes:
        places[name] = (start, shape)
        start += math.prod(shape)
    return Structure(section.model_validate_json(settings), from_block, is_per_neuron, places)
