"""A frozen norm layer whose scale and shift train as small changes."""

from __future__ import annotations

import torch
from torch import nn


class TunedNorm(nn.Module):
    """Any norm with a weight and a bias; `current` holds what this forward pass adds to each."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.current: dict[str, torch.Tensor] = {}

    def own_parameters(self) -> list[nn.Parameter]:
        """The norm's parameters that trained changes are added to: all."""
        return list(self.base.parameters())

    def changed(self) -> dict[str, torch.Tensor]:
        """Its parameters with the current changes added."""
        return {name: tensor + self.current[name] for name, tensor in self.base.named_parameters()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = {name: tensor.to(x.dtype) for name, tensor in self.changed().items()}
        return torch.func.functional_call(self.base, tensors, (x,))
