"""SSF: the output of every layer and every norm is scaled and shifted (arXiv 2210.08823).

y' = (1 + scale) * y + shift        one scale and one shift a channel; both start at zero, without effect

Layers and norms that the network does not call have no output and are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.adaptation.channels import channel_dims
from pipeline.adaptation.sites import norms_of, tunable_layers, weight_reader
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError
from pipeline.specs import Ssf


class ScaleShift(nn.Module):
    """The scale and shift behind one module. `current` holds this forward pass's `scale` [C] and `shift` [C]."""

    def __init__(self, channel_dim: int) -> None:
        super().__init__()
        self.shape = (-1, *[1] * (-1 - channel_dim))
        self.current: dict[str, torch.Tensor] = {}

    def change_output(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Hook of the module."""
        scale, shift = (self.current[key].view(self.shape) for key in ("scale", "shift"))
        # in float32, where 1 + scale keeps its digits, and back
        return torch.addcmul(shift, output, 1 + scale).to(output.dtype)


def _sites(backbone: LoadedBackbone) -> dict[str, nn.Module]:
    """Layers and norms by name. Raises BackboneError where a block uses a layer's weight without calling it, so that no output could be changed."""
    model = backbone.model
    read = weight_reader(model)
    if read is not None:
        raise BackboneError(
            f"recipe.ssf: {type(model).__name__}'s {read!r} uses the weight of its qkv without calling the layer; leave this part out"
        )
    dims = channel_dims(backbone)
    return {name: module for name, module in {**tunable_layers(model), **norms_of(model)}.items() if name in dims}


def plan_ssf(backbone: LoadedBackbone, spec: Ssf) -> list[PlannedTensor]:
    """A scale and a shift for every layer and norm. Raises BackboneError as `_sites`."""
    channels = {name: len(module.weight) for name, module in _sites(backbone).items()}  # type: ignore[arg-type]
    return [PlannedTensor("adapters", f"ssf.{name}.{key}", (count,), spec.bits) for name, count in channels.items() for key in ("scale", "shift")]


def attach_ssf(model: nn.Module, backbone: LoadedBackbone) -> dict[str, ScaleShift]:
    """Hook a scale and a shift behind the layers and norms named by `backbone`, the network as timm made it."""
    changes = {}
    for name in _sites(backbone):
        changes[f"ssf.{name}"] = ScaleShift(channel_dims(backbone)[name])
        model.get_submodule(name).register_forward_hook(changes[f"ssf.{name}"].change_output)
    return changes
