"""Full fine-tuning: every parameter of the backbone trains, as a change added to the frozen one. A
baseline, at the size of the backbone.
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.adaptation.part import Assembly, Part, Site, Stage, WeightChange, register
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.specs import Full


class TunedNetwork(nn.Module, WeightChange):
    """A frozen network on other weights. `current` holds the change of each of its parameters,
    flattened to a matrix where it has more dimensions.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.current: dict[str, torch.Tensor] = {}
        self._merged: dict[str, torch.Tensor] | None = None

    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters that trained changes are added to: all."""
        return list(self.base.parameters())

    def merge(self, is_merged: bool) -> None:
        """Merge the current changes into the weights, or undo that."""
        self._forget()
        self._merged = self.plain_tensors() if is_merged else None

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """Its parameters with the current changes added."""
        return {
            name: frozen + self.current[name].view(frozen.shape)
            for name, frozen in self.base.named_parameters()
        }

    def _forget(self) -> None:
        """Set the mode, which clears what a network caches of its parameters between passes
        (LeViT's attention biases).
        """
        self.base.train(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._merged is None:
            self._forget()
        return torch.func.functional_call(
            self.base, self.plain_tensors() if self._merged is None else self._merged, (x,)
        )


@register
class FullPart(Part):
    """Every parameter of the backbone."""

    name, pack_order, stage = "full", 12, Stage.NETWORK

    def plan(self, spec: Full, site: Site) -> list[PlannedTensor]:
        """A tensor per parameter.

        A kernel is one matrix [out, in * kh * kw], with one mean and one sd below 16 bits.
        """
        shapes = {
            name: (tensor.flatten(1) if tensor.ndim > 2 else tensor).shape
            for name, tensor in site.model.named_parameters()
        }
        return [
            PlannedTensor("full", f"full.{name}", tuple(shape), spec.bits)
            for name, shape in shapes.items()
        ]

    def attach(self, spec: Full, assembly: Assembly) -> None:
        """Wrap the whole network."""
        assembly.model = assembly.modules["full"] = TunedNetwork(assembly.model)
