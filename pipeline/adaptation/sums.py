"""What the modules of a model receive before a forward pass: the trained values or, of parts that
change frozen tensors, the sums of both.

All sums are computed together, and under autocast rounded together, so that a step launches a few
kernels for them, whatever the number of layers. The same goes for the weights that connections are
written into: all of them are one flat copy, written by one operation. Gradients are gathered
likewise, see products.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.adaptation.part import Receiver, WeightChange
from pipeline.adaptation.parts.connections import TunedLayer
from pipeline.adaptation.products import Products
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.adaptation.values import FlatValues, TrainedValues

_ALIGNMENT = 64
"""Entries between whose multiples weights start: products of weights elsewhere are slower."""

Receivers = Mapping[PlannedTensor, tuple[Receiver, str]]


class Sums(nn.Module):
    """Adds the trained values of a model to the frozen ones. Called by the model, in the autocast
    context of the pass under way.
    """

    def __init__(self, values: TrainedValues, receivers: Receivers) -> None:
        super().__init__()
        self._values = [values]  # in a list: the model has them registered
        runs = [_runs(group, receivers) for group in values.groups()]
        self.runs = nn.ModuleList([nn.ModuleList(each) for each in runs])

    def forward(self) -> dict[PlannedTensor, torch.Tensor]:
        """What is handed out for each tensor, of its shape."""
        handed: dict[PlannedTensor, torch.Tensor] = {}
        for flat_N, runs in zip(self._values[0].flats(), self.runs, strict=True):
            assert isinstance(runs, nn.ModuleList)
            pieces = _split(flat_N, [len(run) for run in runs])  # type: ignore[arg-type]
            for run, piece_N in zip(runs, pieces, strict=True):
                handed |= run(piece_N)
        return handed


class _Run(nn.Module):
    """Consecutive tensors of a group that are handed out alike."""

    frozen_N: torch.Tensor | None

    def __init__(self, tensors: Sequence[PlannedTensor], receivers: Receivers) -> None:
        super().__init__()
        self.tensors = tuple(tensors)
        frozen = [_frozen(tensor, receivers) for tensor in tensors]
        known = [each.reshape(-1) for each in frozen if each is not None]
        self.register_buffer("frozen_N", torch.cat(known) if known else None, persistent=False)
        self.is_rounded = _is_rounded(tensors[0], receivers)
        layers = [(tensor, receivers[tensor][0]) for tensor in tensors]
        tuned = {
            number: layer
            for number, (tensor, layer) in enumerate(layers)
            if isinstance(layer, TunedLayer) and tensor.part == "connections"
        }
        self.written = WrittenWeights(list(tuned.values())) if tuned else None
        alike = {number: layer for number, layer in tuned.items() if layer.always_keeps_columns}
        self.sizes = [tensor.values for tensor in tensors]
        self.products = Products(self.sizes, alike) if alike else None

    def __len__(self) -> int:
        return sum(self.sizes)

    def forward(self, values_N: torch.Tensor) -> dict[PlannedTensor, torch.Tensor]:
        """What is handed out for each tensor."""
        if self.frozen_N is not None:
            values_N = self.frozen_N + values_N
        device = values_N.device.type
        if self.is_rounded and torch.is_autocast_enabled(device):
            values_N = values_N.to(torch.get_autocast_dtype(device))
        if self.written is not None and torch.is_grad_enabled():
            self.written.write(values_N.detach())
        pieces = self.products(values_N) if self.products else _split(values_N, self.sizes)
        return {
            tensor: piece.view(tensor.shape)
            for piece, tensor in zip(pieces, self.tensors, strict=True)
        }


class WrittenWeights(nn.Module):
    """Copies of the weights of layers with connections, which are written into them before a pass
    that is differentiated; every layer's `written` is its own.

    The copies are made once and kept, also through evaluations: a recorded step writes to their
    addresses.
    """

    index_N: torch.Tensor

    def __init__(self, layers: Sequence[TunedLayer]) -> None:
        super().__init__()
        self._layers = list(layers)  # not registered: they belong to the network
        sizes = [-(-layer.base.weight.numel() // _ALIGNMENT) * _ALIGNMENT for layer in layers]
        self._starts = list(itertools.accumulate(sizes, initial=0))
        index = [
            layer.index_N + start
            for layer, start in zip(layers, self._starts, strict=False)
            if layer.index_N is not None
        ]
        self.register_buffer("index_N", torch.cat(index), persistent=False)
        self._flat: torch.Tensor | None = None

    def write(self, values_N: torch.Tensor) -> None:
        """Write the entries of all layers, in the values' type and on their device."""
        flat = self._flat
        if flat is None or flat.dtype != values_N.dtype or flat.device != values_N.device:
            flat = self._flat = self._copied(values_N)
        flat.index_copy_(0, self.index_N, values_N[: len(self.index_N)])

    def _copied(self, like: torch.Tensor) -> torch.Tensor:
        flat = torch.zeros(self._starts[-1], dtype=like.dtype, device=like.device)
        for layer, start in zip(self._layers, self._starts, strict=False):
            weight = layer.base.weight.detach()
            layer.written = flat[start : start + weight.numel()].view(weight.shape)
            layer.written.copy_(weight)
        return flat


def _split(values_N: torch.Tensor, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    """Pieces of these sizes. The backward pass would copy a single one."""
    return values_N.split(sizes) if len(sizes) > 1 else [values_N]  # type: ignore[no-untyped-call]


def _runs(group: FlatValues, receivers: Receivers) -> list[_Run]:
    def handed_alike(tensor: PlannedTensor) -> tuple[bool, bool]:
        return _frozen(tensor, receivers) is None, _is_rounded(tensor, receivers)

    grouped = itertools.groupby(group.tensors, handed_alike)
    return [_Run(list(tensors), receivers) for _, tensors in grouped]


def _frozen(tensor: PlannedTensor, receivers: Receivers) -> torch.Tensor | None:
    module, key = receivers[tensor]
    return module.frozen(key) if isinstance(module, WeightChange) else None


def _is_rounded(tensor: PlannedTensor, receivers: Receivers) -> bool:
    module = receivers[tensor][0]
    return isinstance(module, WeightChange) and module.is_rounded
