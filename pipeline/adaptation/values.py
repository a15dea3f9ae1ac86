"""All trained values of a model: one flat parameter per way of rounding, passed to the modules as
named tensors before every forward pass.

An optimiser sees a few parameters instead of hundreds, and quantisation costs a few operations
per step, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from pipeline.adaptation.quantiser import Runs, encode, quantise, runs_of
from pipeline.adaptation.tensors import PlannedTensor


class FlatValues(nn.Module):
    """The trained values that are rounded alike, in the plan's order."""

    lengths_G: torch.Tensor

    def __init__(self, tensors: Sequence[PlannedTensor], initial: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tuple(tensors)
        self.bits, self.codebook, self.has_mean = tensors[0].rounding
        self.latent_N = nn.Parameter(torch.cat([values.reshape(-1) for values in initial]))
        lengths = [tensor.values // tensor.runs for tensor in tensors for _ in range(tensor.runs)]
        runs = runs_of(torch.tensor(lengths), self.has_mean)
        for name, buffer in runs._asdict().items():
            if name == "lengths_G" or self.bits < 16:
                self.register_buffer(name, buffer, persistent=False)
        self.is_stored = False

    def flat(self) -> torch.Tensor:
        """All values [N] as they are, or will be, stored."""
        if self.is_stored:
            return self.latent_N
        runs = Runs(*map(self.get_buffer, Runs._fields)) if self.bits < 16 else None
        return quantise(
            self.latent_N, self.lengths_G, self.bits, self.codebook, self.has_mean, runs
        )

    def forward(self) -> list[torch.Tensor]:
        """Each tensor's values as they are, or will be, stored."""
        pieces = self.flat().split([tensor.values for tensor in self.tensors])
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
        """Load values from a pack, which are then used unchanged."""
        self.latent_N.copy_(torch.cat([values[tensor].reshape(-1) for tensor in self.tensors]))
        self.is_stored = True


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

    def forward(self) -> dict[PlannedTensor, torch.Tensor]:
        """The values of every tensor, quantised."""
        return {
            tensor: values
            for group in self.groups()
            for tensor, values in zip(group.tensors, group(), strict=True)
        }

    def encode(self) -> dict[PlannedTensor, tuple[np.ndarray, np.ndarray | None]]:
        """The codes and scales of every tensor, as a pack stores them."""
        return {
            tensor: codes for group in self.groups() for tensor, codes in group.encode().items()
        }

    def load_stored(self, values: Mapping[PlannedTensor, torch.Tensor]) -> None:
        """Load every tensor's values from a pack."""
        for group in self.groups():
            group.load_stored(values)

    def groups(self) -> list[FlatValues]:
        """The flat parameters."""
        return [group for group in self.flat if isinstance(group, FlatValues)]
