"""A frozen norm layer whose scale and shift, or shift alone, train as small changes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.adaptation.wrapper import Wrapper


class TunedNorm(Wrapper):
    """Any norm with a weight and a bias; `current` holds what this forward pass adds to each of its `trained` parameters."""

    def __init__(self, base: nn.Module, trained: Collection[str]) -> None:
        super().__init__(base)
        self.trained = frozenset(trained)
        self.current: dict[str, torch.Tensor] = {}

    def own_parameters(self) -> list[nn.Parameter]:
        """The norm's parameters that trained changes are added to."""
        return [tensor for name, tensor in self.base.named_parameters() if name in self.trained]

    def changed(self) -> dict[str, torch.Tensor]:
        """Its trained parameters with the current changes added."""
        return {name: tensor + self.current[name] for name, tensor in self.base.named_parameters() if name in self.trained}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = {**dict(self.base.named_parameters()), **self.changed()}
        if not isinstance(self.base, _BatchNorm):  # whose running statistics stay float32, and its parameters must be of their type
            tensors = {name: tensor.to(x.dtype) for name, tensor in tensors.items()}
        return torch.func.functional_call(self.base, tensors, (x,))
