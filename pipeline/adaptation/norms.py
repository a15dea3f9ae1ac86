"""A frozen norm layer whose scale and shift, or shift alone, train as small changes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn


class TunedNorm(nn.Module):
    """Any norm with a weight and a bias; `current` holds what this forward pass adds to each of its `trained` parameters."""

    def __init__(self, base: nn.Module, trained: Collection[str]) -> None:
        super().__init__()
        self.base = base
        self.trained = frozenset(trained)
        self.current: dict[str, torch.Tensor] = {}

    def own_parameters(self) -> list[nn.Parameter]:
        """The norm's parameters that trained changes are added to."""
        return [tensor for name, tensor in self.base.named_parameters() if name in self.trained]

    def changed(self) -> dict[str, torch.Tensor]:
        """Its trained parameters with the current changes added."""
        return {name: tensor + self.current[name] for name, tensor in self.base.named_parameters() if name in self.trained}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = {name: tensor.to(x.dtype) for name, tensor in {**dict(self.base.named_parameters()), **self.changed()}.items()}
        return torch.func.functional_call(self.base, tensors, (x,))
