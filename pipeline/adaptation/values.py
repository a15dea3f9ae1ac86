"""All trained values of a model: one flat parameter per way of rounding, passed to the modules as
named tensors before every forward pass.

An optimiser sees a few parameters instead of hundreds, and quantisation costs a few operations
per step, whatever the number of layers: those below 16 bits are quantised together, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from pipeline.adaptation.quantiser import (
    Runs,
    Slice,
    encode,
    quantise,
    quantise_slices,
    runs_of,
)
from pipeline.adaptation.tensors import PlannedTensor


class FlatValues(nn.Module):
    """The trained values that are rounded alike, in the plan's order."""

    lengths_G: torch.Tensor

    def __init__(self, tensors: Sequence[PlannedTensor], initial: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tuple(tensors)
        self.bits, self.codebook, self.has_mean = tensors[0].rounding
        self.latent_N = nn.Parameter(torch.cat([values.reshape(-1) for values in initial]))
        runs = [tensor.values // tensor.runs for tensor in tensors for _ in range(tensor.runs)]
        self.register_buffer("lengths_G", torch.tensor(runs), persistent=False)

    def pieces(self, flat_N: torch.Tensor) -> list[torch.Tensor]:
        """Each tensor's values."""
        pieces = flat_N.split([tensor.values for tensor in self.tensors])
        return [
            piece.view(tensor.shape) for piece, tensor in zip(pieces, self.tensors, strict=True)
        ]

    def encode(self) -> dict[PlannedTensor, tuple[np.ndarray, np.ndarray | None]]:
        """For each tensor its flat codes and, below 16 bits, its scales [runs, 2]."""
        codes_N, scales_G2 = encode(
            self.latent_N, self.lengths_G, self.bits, self.codebook, self.has_mean
        )
        codes = np.split(codes_N, np.cumsum([tensor.values for tensor in self.tensors])[:-1])
        if scales_G2 is None:
            return {tensor: (code, None) for tensor, code in zip(self.tensors, codes, strict=True)}
        scales = np.split(scales_G2, np.cumsum([tensor.runs for tensor in self.tensors])[:-1])
        return {
            tensor: (code, scale)
            for tensor, code, scale in zip(self.tensors, codes, scales, strict=True)
        }

    @torch.no_grad()
    def load_stored(self, values: Mapping[PlannedTensor, torch.Tensor]) -> None:
        """Load values from a pack."""
        self.latent_N.copy_(torch.cat([values[tensor].reshape(-1) for tensor in self.tensors]))


class _LowBits(nn.Module):
    """Flat values below 16 bits that are quantised together, with means or without."""

    def __init__(self, groups: Sequence[FlatValues]) -> None:
        super().__init__()
        self.groups = list(groups)
        self.has_mean = groups[0].has_mean
        self.slices = [
            Slice(len(group.latent_N), group.bits, group.codebook) for group in self.groups
        ]
        runs = runs_of(torch.cat([group.lengths_G for group in groups]), self.has_mean)
        for name, buffer in runs._asdict().items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self) -> Sequence[torch.Tensor]:
        """The values [N] of each group as they will be stored."""
        runs = Runs(*map(self.get_buffer, Runs._fields))
        latents: list[torch.Tensor] = [group.latent_N for group in self.groups]
        if len(latents) == 1:
            return [quantise_slices(latents[0], runs, self.slices, self.has_mean)]
        flat_N = quantise_slices(torch.cat(latents), runs, self.slices, self.has_mean)
        return flat_N.split([values for values, _, _ in self.slices])


class TrainedValues(nn.Module):
    """Every trained tensor of a model."""

    def __init__(self, initial: Mapping[PlannedTensor, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tuple(initial)
        roundings = sorted({tensor.rounding for tensor in initial})
        groups = [
            [tensor for tensor in initial if tensor.rounding == rounding] for rounding in roundings
        ]
        self.flat = nn.ModuleList(
            [FlatValues(group, [initial[tensor] for tensor in group]) for group in groups]
        )
        low = [group for group in self.groups() if group.bits < 16]
        shared = [[group for group in low if group.has_mean is mean] for mean in (False, True)]
        self.low_bits = nn.ModuleList([_LowBits(alike) for alike in shared if alike])
        self.is_stored = False

    def flats(self) -> list[torch.Tensor]:
        """The values [N] of each group as they are, or will be, stored."""
        if self.is_stored:
            return [group.latent_N for group in self.groups()]
        found = {
            group: quantise(group.latent_N, group.lengths_G, group.bits)
            for group in self.groups()
            if group.bits >= 16
        }
        for low_bits in self.low_bits:
            assert isinstance(low_bits, _LowBits)
            found |= zip(low_bits.groups, low_bits(), strict=True)
        return [found[group] for group in self.groups()]

    def forward(self) -> dict[PlannedTensor, torch.Tensor]:
        """The values of every tensor, quantised."""
        return {
            tensor: values
            for group, flat_N in zip(self.groups(), self.flats(), strict=True)
            for tensor, values in zip(group.tensors, group.pieces(flat_N), strict=True)
        }

    def encode(self) -> dict[PlannedTensor, tuple[np.ndarray, np.ndarray | None]]:
        """The codes and scales of every tensor, as a pack stores them."""
        return {
            tensor: codes for group in self.groups() for tensor, codes in group.encode().items()
        }

    def load_stored(self, values: Mapping[PlannedTensor, torch.Tensor]) -> None:
        """Load every tensor's values from a pack, which are then used unchanged."""
        for group in self.groups():
            group.load_stored(values)
        self.is_stored = True

    def groups(self) -> list[FlatValues]:
        """The flat parameters."""
        return [group for group in self.flat if isinstance(group, FlatValues)]
