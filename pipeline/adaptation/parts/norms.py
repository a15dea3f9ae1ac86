"""A frozen norm layer whose scale and shift, or shift alone, train as small changes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.adaptation.channels import channel_dims
from pipeline.adaptation.part import (
    MLP_BLOCKS,
    PARTS,
    Assembly,
    Mixing,
    Part,
    SharedNetwork,
    Site,
    Stage,
    WeightChange,
    register,
)
from pipeline.adaptation.sites import norms_of
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.adaptation.wrapper import Wrapper
from pipeline.specs import Norms

if TYPE_CHECKING:
    from pipeline.adaptation.lanes import Lane


class TunedNorm(Wrapper, WeightChange):
    """Any norm with a weight and a bias; `current` holds the `trained` ones of this pass."""

    def __init__(self, base: nn.Module, trained: Collection[str]) -> None:
        super().__init__(base)
        self.trained = frozenset(trained)
        self.current: dict[str, torch.Tensor] = {}
        # Running statistics stay float32, and a batch norm's parameters must be of their type.
        self.is_rounded = not isinstance(base, _BatchNorm)

    def frozen(self, key: str) -> torch.Tensor | None:
        """The norm's own parameter."""
        return self.base.get_parameter(key).detach()

    def own_parameters(self) -> list[nn.Parameter]:
        """The norm's parameters that trained changes are added to."""
        return [tensor for name, tensor in self.base.named_parameters() if name in self.trained]

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """Its trained parameters with the current changes."""
        return {name: self.current[name] for name in sorted(self.trained)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = {**dict(self.base.named_parameters()), **self.plain_tensors()}
        if self.is_rounded:
            tensors = {name: tensor.to(x.dtype) for name, tensor in tensors.items()}
        return torch.func.functional_call(self.base, tensors, (x,))


class MixedNorm(Wrapper):
    """A norm whose scale and shift are those of each sample's pack."""

    def __init__(self, base: nn.Module, name: str, dim: int, network: SharedNetwork) -> None:
        super().__init__(base)
        self.name, self.dim, self.network = name, dim, network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lanes = [
            lane
            for lane in self.network.lanes(PARTS[NormsPart.name])
            if lane.has(f"{self.name}.weight") or lane.has(f"{self.name}.bias")
        ]
        y: torch.Tensor = self.base(x) if not any(lane.is_whole for lane in lanes) else x
        for lane in lanes:
            y = lane.change(y, lambda _, x, lane=lane: self._normalised(lane, x), x)
        return y

    def _normalised(self, lane: Lane, x: torch.Tensor) -> torch.Tensor:
        frozen = dict(self.base.named_parameters())
        plain = {
            name: torch.ones_like(tensor) if name == "weight" else torch.zeros_like(tensor)
            for name, tensor in frozen.items()
        }
        own = {
            name: lane.along(lane.values(f"{self.name}.{name}") + tensor, x, self.dim)
            if lane.has(f"{self.name}.{name}")
            else self._along_channels(tensor)
            for name, tensor in frozen.items()
        }
        normal = torch.func.functional_call(self.base, plain, (x,))
        if "bias" not in own:
            return normal.mul_(own["weight"])
        return torch.addcmul(own["bias"], normal, own["weight"], out=normal)

    def _along_channels(self, tensor_C: torch.Tensor) -> torch.Tensor:
        return tensor_C.view(-1, *[1] * (-1 - self.dim))


def _parameters(norm: nn.Module, spec: Norms) -> dict[str, nn.Parameter]:
    """Those of a norm's parameters that train."""
    return {
        name: tensor for name, tensor in norm.named_parameters() if spec.parameters in ("all", name)
    }


def _norms(site: Site, spec: Norms) -> list[str]:
    """The names of the norms that train."""
    if spec.which == "all":
        return list(site.norms)
    return [f"{slot.block}.{slot.norm}" for slot in site.slots]


@register
class NormsPart(Part):
    """Scale and shift of norms, as changes."""

    name, pack_order, stage = "norms", 3, Stage.NORMS
    needs = f"{MLP_BLOCKS}, or `which: all`"

    def plan(self, spec: Norms, site: Site) -> list[PlannedTensor]:
        """A vector per trained parameter of each norm."""
        return [
            PlannedTensor("norms", f"{norm}.{name}", tuple(tensor.shape), spec.bits)
            for norm in _norms(site, spec)
            for name, tensor in _parameters(site.model.get_submodule(norm), spec).items()
        ]

    def attach(self, spec: Norms, assembly: Assembly) -> None:
        """Replace the norms."""
        names = _norms(assembly.site, spec)
        bases = {name: assembly.model.get_submodule(name) for name in names}
        for name, base in bases.items():
            norm = assembly.modules[name] = TunedNorm(base, _parameters(base, spec))
            assembly.model.set_submodule(name, norm)

    def mix(self, network: SharedNetwork) -> Mixing:
        """Replace the norms, where the network calls all of them."""
        norms, dims = norms_of(network.model), channel_dims(network.site.backbone)
        if not norms.keys() <= dims.keys():
            return Mixing.APART
        for name, norm in norms.items():
            network.model.set_submodule(name, MixedNorm(norm, name, dims[name], network))
        return Mixing.FREELY
