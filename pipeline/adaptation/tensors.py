"""A planned tensor: its name, shape, bits and initial values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pipeline.packs import Codebook, PartName
from pipeline.specs import Bits

Start = Literal["change", "linear", "up", "near_zero", "fan_in", "unit", "head", "ssf"]
"""How a tensor starts.

change: zero, because it is added to something frozen. linear: as nn.Linear. up, the second matrix
of an adapter: zero. near_zero, fan_in, unit, head, ssf: normal of standard deviation 1e-3,
1 / sqrt(inputs), 1, 0.02 and 0.02. Below 16 bits, a tensor of zeros has no sign to learn: change is
normal of standard deviation 1e-4, up is normal of 1e-3, cut at two of them.
"""
_DEVIATIONS = {"near_zero": 1e-3, "unit": 1.0, "head": 0.02, "ssf": 0.02}


@dataclass(frozen=True)
class PlannedTensor:
    """One trained tensor. `layer` is (neurons, inputs of a neuron) of the layer whose connections
    these are, None for other parts.

    codebook, by_row, has_mean: the levels of its codes below 16 bits, whether every row of a
    matrix has its own scales, and whether the scales include a mean.
    """

    part: PartName
    name: str
    shape: tuple[int, ...]
    bits: Bits
    layer: tuple[int, int] | None = None
    start: Start = "change"
    codebook: Codebook = "median"
    by_row: bool = False
    has_mean: bool = True

    @property
    def values(self) -> int:
        """Number of trained values."""
        return math.prod(self.shape)

    @property
    def rounding(self) -> tuple[Bits, Codebook, bool]:
        """Key of the tensors whose values are rounded together: bits, codebook, has_mean."""
        return self.bits, self.codebook, self.has_mean

    @property
    def runs(self) -> int:
        """Number of runs of values with their own mean and std: trailing 2-D matrices, or their
        rows; a vector is one run.
        """
        return math.prod(self.shape[:-1] if self.by_row else self.shape[:-2])


def initial_values(tensor: PlannedTensor, generator: torch.Generator) -> torch.Tensor:
    """The values a tensor starts with; `generator` makes every draw."""
    start, initial = tensor.start, torch.empty(tensor.shape)
    if start == "linear":
        bound = tensor.shape[-1] ** -0.5
        return initial.uniform_(-bound, bound, generator=generator)
    if start in ("change", "up") and tensor.bits >= 16:
        return initial.zero_()
    if (
        start == "up"
    ):  # as Binary Adapter's code; torch's bounds are values, not standard deviations
        return nn.init.trunc_normal_(initial, std=1e-3, a=-2e-3, b=2e-3, generator=generator)
    if start == "change":
        return initial.normal_(0, 1e-4, generator=generator)
    deviation = tensor.shape[-1] ** -0.5 if start == "fan_in" else _DEVIATIONS[start]
    return initial.normal_(0, deviation, generator=generator)
