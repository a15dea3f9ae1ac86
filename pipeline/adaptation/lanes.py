"""A batch whose samples belong to different packs, part by part.

Packs that have a part in the same structure form a lane of it: their values are stacked, so that
the part takes the same few operations for any number of packs. Where values differ in shape
(another width, more experts), there is a lane for each structure. Legend: B samples of a batch, P
packs of a lane, S samples of a lane, C channels.

In every layer, the samples of an image are consecutive rows of the first dimension: B, or B times
the image's windows.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from pipeline.adaptation.compact import expanded
from pipeline.adaptation.flat import FlatPack, FlatPart, Structure


class Lane:
    """The samples of a batch whose packs have a part in one structure.

    Args:
        samples: of the batch, ascending; None for all.
        owners: which of `parts` each of these samples belongs to.
        batch: number of samples of the batch.
    """

    def __init__(
        self,
        structure: Structure,
        parts: Sequence[FlatPart],
        samples: Sequence[int] | None,
        owners: Sequence[int],
        batch: int,
    ) -> None:
        device = parts[0].values.device
        self.spec: Any = structure.spec
        self.from_block, self.is_per_neuron = structure.from_block, structure.is_per_neuron
        self.parts = parts
        self._places, self._batch = structure.places, batch
        self._samples_S = None if samples is None else torch.tensor(samples, device=device)
        in_order = list(owners) == list(range(len(parts)))
        self._owner_S = None if in_order else torch.tensor(owners, device=device)
        self._made: dict[Hashable, Any] = {}

    @functools.cached_property
    def _stacked(self) -> torch.Tensor:
        return expanded([part.values for part in self.parts]).view(len(self.parts), -1)

    @functools.cached_property
    def _stacked_indices(self) -> torch.Tensor:
        return torch.stack([part.index_N for part in self.parts if part.index_N is not None])

    @property
    def packs(self) -> int:
        """How many packs have the part in this structure."""
        return len(self.parts)

    @property
    def is_whole(self) -> bool:
        """Whether all samples of the batch are the lane's."""
        return self._samples_S is None

    def has(self, name: str) -> bool:
        """Whether the part has this tensor."""
        return name in self._places

    def values(self, name: str) -> torch.Tensor:
        """The tensor of each sample's pack, [S, ...]."""
        start, shape = self._places[name]
        return self._by_sample(
            self._stacked[:, start : start + math.prod(shape)].unflatten(1, shape)
        )

    def connections(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns, int64, and the values of a layer's connections of each sample's pack, [S,
        N], if they are per neuron.
        """
        columns_SN = self._by_sample(self._stacked_indices[:, self._numbers(name)]).long()
        return columns_SN, self.values(name)

    def per_pack(self, name: str, layer: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The indices, int64, and the values of the connections of each pack in a layer of as many
        neurons and inputs, [P, N].
        """
        numbers = self._numbers(name)
        index_PN, values_PN = self._stacked_indices[:, numbers].long(), self._stacked[:, numbers]
        if self.is_per_neuron:
            neurons, inputs = layer
            starts_O = torch.arange(0, neurons * inputs, inputs, device=index_PN.device)
            index_PN += starts_O.repeat_interleave(index_PN.shape[1] // neurons)
        return index_PN, values_PN

    def _numbers(self, name: str) -> slice:
        start, (count,) = self._places[name]
        return slice(start, start + count)

    def _by_sample(self, each_P: torch.Tensor) -> torch.Tensor:
        return each_P if self._owner_S is None else each_P.index_select(0, self._owner_S)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives the first time, for everything that reads it in this pass."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def along(self, values_SC: torch.Tensor, y: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Numbers per channel as a factor or term of `y`, the lane's rows of an activation whose
        channels are at `dim`, counted from the last.
        """
        repeats = len(y) // len(values_SC)
        if repeats > 1:
            values_SC = values_SC.repeat_interleave(repeats, dim=0)
        channels = values_SC.shape[1]
        return values_SC.view(len(y), *[1] * (y.ndim - 1 + dim), channels, *[1] * (-1 - dim))

    def add(self, name: str, dim: int, y: torch.Tensor) -> torch.Tensor:
        """Add the tensor of each sample's pack along the channels at `dim`, in place, to the lane's
        rows of an output that nothing else reads.
        """
        return y.add_(self.along(self.values(name), y, dim))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of the lane's samples."""
        if self._samples_S is None:
            return x
        return x.index_select(0, self._rows_of(x))

    def change(
        self, y: torch.Tensor, function: Callable[..., torch.Tensor], *others: torch.Tensor
    ) -> torch.Tensor:
        """`y` with the lane's rows replaced by `function` of them, and of the same rows of
        `others`.
        """
        changed = function(self.rows(y), *(self.rows(other) for other in others)).to(y.dtype)
        if self._samples_S is None:
            return changed
        return y.index_copy(0, self._rows_of(y), changed)

    def _rows_of(self, x: torch.Tensor) -> torch.Tensor:
        assert self._samples_S is not None
        repeats = len(x) // self._batch
        if repeats == 1:
            return self._samples_S
        first_S1 = self._samples_S[:, None] * repeats
        return (first_S1 + torch.arange(repeats, device=x.device)).flatten()


class MixedBatch:
    """Samples of several packs in one pass: `owners` says which of `packs` each belongs to, in
    ascending order.
    """

    def __init__(self, packs: Sequence[FlatPack], owners: Sequence[int]) -> None:
        assert list(owners) == sorted(owners)
        self.packs, self.owners = packs, owners
        self._runs: dict[str, list[tuple[FlatPart | None, int]]] = {}
        members: dict[str, dict[Structure, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, pack in enumerate(packs):
            for name, part in pack.parts.items():
                members[name][part.structure].append(number)
        self._lanes = {
            name: [self._lane(name, structure, numbers) for structure, numbers in lanes.items()]
            for name, lanes in members.items()
        }

    def lanes(self, name: str) -> list[Lane]:
        """The lanes of a part; none where no pack has it."""
        return self._lanes.get(name, [])

    def runs(self, name: str) -> list[tuple[FlatPart | None, int]]:
        """Consecutive samples by their pack's part: the part, and the number of samples. Packs that
        lack the part are one run where they are neighbours.
        """
        if name not in self._runs:
            parts = [self.packs[owner].parts.get(name) for owner in self.owners]
            grouped = [list(same) for _, same in itertools.groupby(parts, key=id)]
            self._runs[name] = [(same[0], len(same)) for same in grouped]
        return self._runs[name]

    def _lane(self, name: str, structure: Structure, numbers: Sequence[int]) -> Lane:
        place = {number: place for place, number in enumerate(numbers)}
        samples = [sample for sample, owner in enumerate(self.owners) if owner in place]
        owners = [place[self.owners[sample]] for sample in samples]
        count = len(self.owners)
        parts = [self.packs[number].parts[name] for number in numbers]
        return Lane(structure, parts, None if len(samples) == count else samples, owners, count)
