"""Biases of the layers, and the other parameters that GPS's code trains next to its connections.

Its rule goes by names (FightingFighting/GPS, utils/pruning.py): every parameter with `bias` or
`gamma` in its name trains, but none with `norm`, `pos_embed` or `cls_token` in it. So the tables of
relative position biases (Swin), biases that attention keeps itself (BEiT's q_bias and v_bias) and
LayerScale's gammas train. Biases of Linear and Conv2d layers are added in connections.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import LayerScale
from torch import nn
from torch.nn.utils import parametrize

from pipeline.adaptation.channels import channel_dims
from pipeline.adaptation.mixed_layer import MixedLayer
from pipeline.adaptation.part import (
    Assembly,
    Mixing,
    Part,
    SharedNetwork,
    Site,
    Stage,
    WeightChange,
    register,
)
from pipeline.adaptation.parts.connections import tune_layers
from pipeline.adaptation.sites import norms_of, tunable_layers
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.adaptation.watched import learnt_once
from pipeline.backbones import LoadedBackbone
from pipeline.specs import Biases

if TYPE_CHECKING:
    from pipeline.adaptation.lanes import Lane

_TRAINS = ("bias", "gamma")
_FROZEN = ("norm", "pos_embed", "cls_token")


class TunedParameter(nn.Module, WeightChange):
    """A frozen parameter of any module with a change: `current["change"]` is the sum of both.

    The module that owns the parameter reads the sum under the parameter's name. Under autocast the
    sum is rounded, so that it does not widen the residual stream.
    """

    is_rounded = True

    def __init__(self, frozen: nn.Parameter) -> None:
        super().__init__()
        self.current: dict[str, torch.Tensor] = {}
        self._frozen = [frozen]  # in a list: the owner has it registered
        self._merged: torch.Tensor | None = None

    def frozen(self, key: str) -> torch.Tensor | None:
        """The parameter."""
        return self._frozen[0].detach()

    def own_parameters(self) -> list[nn.Parameter]:
        """The parameter that the change is added to."""
        return self._frozen

    def merge(self, is_merged: bool) -> None:
        """Keep the sum for all further passes, or compute it in each."""
        self._merged = self.current["change"] if is_merged else None

    def forward(self, frozen: torch.Tensor) -> torch.Tensor:
        return self.current["change"] if self._merged is None else self._merged


def other_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters, by name, that train as biases but belong to neither a layer nor a norm.

    Those of recurrent layers are left out, because such a layer reads all its parameters as one
    buffer.
    """
    layers, norms = tunable_layers(model), norms_of(model)
    owners = {
        name
        for name, module in model.named_modules()
        if name not in layers and name not in norms and not isinstance(module, nn.RNNBase)
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] in owners
        and any(word in name for word in _TRAINS)
        and not any(word in name for word in _FROZEN)
    }


@learnt_once
def _others_of(backbone: LoadedBackbone) -> Mapping[str, nn.Parameter]:
    return other_biases(backbone.model)


def _others(site: Site) -> dict[str, nn.Parameter]:
    found = _others_of(site.backbone)
    return {name: parameter for name, parameter in found.items() if site.may_change(name)}


def changed_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a module that are sums of a frozen one and its change."""
    parametrised = getattr(module, "parametrizations", nn.ModuleDict())
    return {name: getattr(module, name) for name in dict(parametrised.named_children())}


def _forget(module: nn.Module, inputs: Any) -> None:
    """Pre-hook: setting the mode clears biases that attention caches between passes (LeViT)."""
    module.train(False)


def _add(name: str, dim: int, lane: Lane, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A layer's output with the changes of its bias."""
    return lane.add(name, dim, y)


def _add_scaled(name: str, lane: Lane, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A LayerScale's output with the changes of its gamma."""
    return y.addcmul_(x, lane.along(lane.values(name), x))


@register
class BiasesPart(Part):
    """The biases, as changes."""

    name, pack_order, stage = "biases", 2, Stage.PARAMETERS
    needs = "it needs parameters named bias or gamma"

    def plan(self, spec: Biases, site: Site) -> list[PlannedTensor]:
        """A vector per layer with a bias, by the layer's name; then the others, by their own."""
        layers = {name: layer.bias for name, layer in site.layers.items()}
        return [
            PlannedTensor("biases", name, tuple(bias.shape), spec.bits)
            for name, bias in {**layers, **_others(site)}.items()
            if bias is not None
        ]

    def attach(self, spec: Biases, assembly: Assembly) -> None:
        """Change the parameters where they are, and replace the layers, if connections will not."""
        own = dict(assembly.model.named_parameters())
        for name in _others(assembly.site):
            owner_name, _, own_name = name.rpartition(".")
            owner = assembly.model.get_submodule(owner_name)
            tuned = assembly.modules[f"bias:{name}"] = TunedParameter(own[name])
            parametrize.register_parametrization(owner, own_name, tuned, unsafe=True)
            owner.register_forward_pre_hook(_forget)
        if assembly.site.recipe.connections is None:
            tune_layers(assembly, {})

    def mix(self, network: SharedNetwork) -> Mixing:
        """Add to the outputs of the layers, and of LayerScales; other parameters would need a copy
        per sample.
        """
        model, dims = network.model, channel_dims(network.site.backbone)
        others = other_biases(network.site.model)
        scales = {
            name: model.get_submodule(name.rpartition(".")[0])
            for name in others
            if name.endswith(".gamma")
        }
        is_other = len(scales) < len(others) or any(
            not isinstance(scale, LayerScale) for scale in scales.values()
        )
        biased = [name for name, layer in network.site.layers.items() if layer.bias is not None]
        if is_other or any(name not in dims for name in biased):
            return Mixing.APART
        for name, scale in scales.items():
            scale.inplace = False  # type: ignore[assignment]
            network.after(self, name, scale, partial(_add_scaled, name))
        for name in biased:
            layer = model.get_submodule(name)
            if not isinstance(layer, MixedLayer):  # which adds its own
                network.after(self, name, layer, partial(_add, name, dims[name]))
        return Mixing.FREELY

    def address(self, tensor: PlannedTensor, modules: Mapping[str, Any]) -> tuple[str, str]:
        """The parameter of the tensor's name, or the bias of the layer."""
        if f"bias:{tensor.name}" in modules:
            return f"bias:{tensor.name}", "change"
        return f"layer:{tensor.name}", "bias"
