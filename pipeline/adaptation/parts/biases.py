"""The biases of the layers that can carry connections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.adaptation.part import Assembly, Part, Site, Stage, register
from pipeline.adaptation.parts.connections import tune_layers
from pipeline.adaptation.sites import tunable_layers
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.specs import Biases


@register
class BiasesPart(Part):
    """The biases, as changes."""

    name, pack_order, stage = "biases", 2, Stage.WEIGHTS
    needs = "it needs Linear or Conv2d layers with a bias"

    def plan(self, spec: Biases, site: Site) -> list[PlannedTensor]:
        """A vector per layer with a bias."""
        layers = tunable_layers(site.model).items()
        return [PlannedTensor("biases", name, tuple(layer.bias.shape), spec.bits) for name, layer in layers if layer.bias is not None]

    def attach(self, spec: Biases, assembly: Assembly) -> None:
        """Replace every layer, where connections have not."""
        if assembly.site.recipe.connections is None:
            tune_layers(assembly, {})

    def address(self, tensor: PlannedTensor, modules: Mapping[str, Any]) -> tuple[str, str]:
        """The layer of the tensor's name."""
        return f"layer:{tensor.name}", "bias"
