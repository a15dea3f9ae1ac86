"""Full fine-tuning: every parameter of the backbone trains, as a change added to the frozen one. A baseline, at the size of the backbone."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.adaptation.tensors import PlannedTensor
from pipeline.specs import Full


class TunedNetwork(nn.Module):
    """A frozen network on other weights. `current` holds the change of each of its parameters, flattened to a matrix where it has more dimensions."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.current: dict[str, torch.Tensor] = {}
        self._merged: dict[str, torch.Tensor] | None = None

    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters that trained changes are added to: all."""
        return list(self.base.parameters())

    def merge(self, is_merged: bool) -> None:
        """Take the current changes into the weights, until told otherwise."""
        self._forget()
        self._merged = self.changed() if is_merged else None

    def changed(self) -> dict[str, torch.Tensor]:
        """Its parameters with the current changes added."""
        return {name: frozen + self.current[name].view(frozen.shape) for name, frozen in self.base.named_parameters()}

    def _forget(self) -> None:
        """Setting the mode drops what a network keeps of its parameters from pass to pass (LeViT's attention biases)."""
        self.base.train(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._merged is None:
            self._forget()
        return torch.func.functional_call(self.base, self.changed() if self._merged is None else self._merged, (x,))


def plan_full(model: nn.Module, spec: Full) -> list[PlannedTensor]:
    """One tensor a parameter. A kernel is one matrix [out, in * kh * kw], with one mean and one sd below 16 bits."""
    return [
        PlannedTensor("full", f"full.{name}", tuple(tensor.flatten(1).shape if tensor.ndim > 2 else tensor.shape), spec.bits)
        for name, tensor in model.named_parameters()
    ]
