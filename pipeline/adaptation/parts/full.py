"""Full fine-tuning: every parameter of the backbone trains, as a change added to the frozen one. A
baseline, at the size of the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pipeline.adaptation.part import Assembly, Part, Site, Stage, WeightChange, register
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.specs import Bits, Full


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
            if name in self.current
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


def changes(parameters: Mapping[str, nn.Parameter], owner: str, bits: Bits) -> list[PlannedTensor]:
    """A tensor per parameter, by name within its owner: a kernel is one matrix
    [out, in * kh * kw], with one mean and one std below 16 bits.
    """
    shapes = {
        name: (parameter.flatten(1) if parameter.ndim > 2 else parameter).shape
        for name, parameter in parameters.items()
    }
    return [
        PlannedTensor("full", f"{owner}.{name}", tuple(shape), bits)
        for name, shape in shapes.items()
    ]


@register
class FullPart(Part):
    """Every parameter of the backbone that may change."""

    name, pack_order, stage = "full", 12, Stage.NETWORK

    def plan(self, spec: Full, site: Site) -> list[PlannedTensor]:
        """A tensor per parameter, see `changes`."""
        parameters = dict(site.model.named_parameters())
        may_change = {name: each for name, each in parameters.items() if site.may_change(name)}
        return changes(may_change, "full", spec.bits)

    def attach(self, spec: Full, assembly: Assembly) -> None:
        """Wrap the whole network."""
        assembly.model = assembly.modules["full"] = TunedNetwork(assembly.model)
