"""A frozen norm layer whose scale and shift train as small changes."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.adaptation.quantiser import small_change
from pipeline.spec import Bits


class TunedNorm(nn.Module):
    """Any norm with a weight and a bias; `changes` holds what is added to each."""

    def __init__(self, base: nn.Module, bits: Bits, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.changes = nn.ModuleDict({name: small_change(tuple(tensor.shape), bits, generator) for name, tensor in base.named_parameters()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = {name: tensor + self.changes[name]() for name, tensor in self.base.named_parameters()}
        return torch.func.functional_call(self.base, tensors, (x,))
