"""SSF: the output of every layer and every norm is scaled and shifted (arXiv 2210.08823).

y' = (1 + scale) * y + shift        one scale and one shift per channel, which start as normal
                                    numbers of standard deviation 0.02, as in its code

Layers and norms that the network does not call have no output and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.adaptation.channels import channel_dims
from pipeline.adaptation.part import (
    Assembly,
    Mixing,
    Part,
    SharedNetwork,
    Site,
    Stage,
    register,
)
from pipeline.adaptation.sites import weight_reader
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.errors import BackboneError, ExportError
from pipeline.specs import Ssf

if TYPE_CHECKING:
    from pipeline.adaptation.lanes import Lane


class ScaleShift(nn.Module):
    """The scale and shift after one module. `current` holds this forward pass's `scale` [C] and
    `shift` [C].
    """

    def __init__(self, channel_dim: int) -> None:
        super().__init__()
        self.shape = (-1, *[1] * (-1 - channel_dim))
        self.current: dict[str, torch.Tensor] = {}

    def change_output(
        self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Hook of the module."""
        scale, shift = (self.current[key].view(self.shape) for key in ("scale", "shift"))
        # in float32, where 1 + scale keeps its digits, and back
        return torch.addcmul(shift, output, 1 + scale).to(output.dtype)


def _sites(site: Site) -> dict[str, nn.Module]:
    """Layers and norms by name. Raises BackboneError where a block uses a layer's weight without
    calling it, so that no output could be changed.
    """
    model = site.model
    read = weight_reader(model)
    if read is not None:
        raise BackboneError(
            f"recipe.ssf: {type(model).__name__}'s {read!r} uses the weight of its qkv without"
            " calling the layer; leave this part out"
        )
    dims = channel_dims(site.backbone)
    return {name: module for name, module in {**site.layers, **site.norms}.items() if name in dims}


def _scale_and_shift(
    prefix: str, dim: int, lane: Lane, y: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    scale, shift = (
        lane.along(lane.values(f"{prefix}.{key}"), y, dim) for key in ("scale", "shift")
    )
    return torch.addcmul(shift, y, 1 + scale)


@register
class SsfPart(Part):
    """A scale and a shift after every layer and norm."""

    name, pack_order, stage = "ssf", 8, Stage.OUTPUTS
    needs = "it needs Linear, Conv2d or norm layers"

    def plan(self, spec: Ssf, site: Site) -> list[PlannedTensor]:
        """Two vectors per layer and norm. Raises BackboneError as `_sites`."""
        modules = _sites(site)
        channels = {name: len(module.weight) for name, module in modules.items()}  # type: ignore[arg-type]
        return [
            PlannedTensor("adapters", f"ssf.{name}.{key}", (count,), spec.bits, start="ssf")
            for name, count in channels.items()
            for key in ("scale", "shift")
        ]

    def attach(self, spec: Ssf, assembly: Assembly) -> None:
        """Hook a scale and a shift onto the layers and norms."""
        backbone = assembly.site.backbone
        for name in _sites(assembly.site):
            change = assembly.modules[f"ssf.{name}"] = ScaleShift(channel_dims(backbone)[name])
            assembly.model.get_submodule(name).register_forward_hook(change.change_output)

    def mix(self, network: SharedNetwork) -> Mixing:
        """Scale and shift the outputs of the layers and norms, where all are called."""
        backbone = network.site.backbone
        if weight_reader(backbone.model) is not None:
            return Mixing.APART
        for name in _sites(network.site):
            change = partial(_scale_and_shift, f"ssf.{name}", channel_dims(backbone)[name])
            network.after(self, f"ssf.{name}.scale", network.model.get_submodule(name), change)
        return Mixing.FREELY

    def write(self, state: dict[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
        """W becomes (1 + scale) W, and b becomes (1 + scale) b + shift."""
        for name in (
            name for name in values if name.startswith("ssf.") and name.endswith(".scale")
        ):
            layer = name.removeprefix("ssf.").removesuffix(".scale")
            if f"{layer}.bias" not in state:
                raise ExportError(
                    f"the part ssf shifts the output of {layer!r}, a layer without a bias, which no"
                    " weight can hold; export to onnx instead"
                )
            scale, shift = 1 + values[f"ssf.{layer}.scale"], values[f"ssf.{layer}.shift"]
            weight = state[f"{layer}.weight"]
            state[f"{layer}.weight"] = weight * scale.view(-1, *[1] * (weight.ndim - 1))
            state[f"{layer}.bias"] = state[f"{layer}.bias"] * scale + shift
