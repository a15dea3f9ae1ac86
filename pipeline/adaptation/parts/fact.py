"""FacT-TT: the changes of all layers as one tensor train (arXiv 2212.03145).

    y = W x + scale * (I_a ⊗ out) dropout(core (I_b ⊗ in) x)

    core is [a R, b R], in [R, D], out [D, R]

`in` and `out` are shared by all layers of one width D; each layer has its own small core. A
layer of b D inputs and a D outputs is cut into pieces of D: the projection of q, k and v has a = 3,
an MLP's first layer a = 4, its second one b = 4. There is no activation and no bias. Dropout is
applied after the core, as in the released code.
Shapes: D width, R rank, T tokens.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.adaptation.dropout import SeededDropout
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
from pipeline.adaptation.parts.connections import TunedLayer
from pipeline.adaptation.sites import apply_layer, weight_reader
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.adaptation.wrapper import Wrapper
from pipeline.errors import BackboneError
from pipeline.specs import Fact

if TYPE_CHECKING:
    from pipeline.adaptation.lanes import Lane


class SharedFactors(nn.Module):
    """The factors of all layers of one width. `current` holds `in` [R, D] and `out` [D, R]."""

    def __init__(self) -> None:
        super().__init__()
        self.current: dict[str, torch.Tensor] = {}


class FactorisedLayer(Wrapper, WeightChange):
    """A layer with a change in factors. `current` holds its `core` [a R, b R]."""

    base: nn.Linear | TunedLayer

    def __init__(
        self,
        base: nn.Linear | TunedLayer,
        factors: SharedFactors,
        spec: Fact,
        dropout: SeededDropout,
    ) -> None:
        super().__init__(base)
        self.scale, self.rank = spec.scale, spec.rank
        self.shared = (factors, dropout)  # in a tuple: neither is a child of this layer
        self.current: dict[str, torch.Tensor] = {}
        self._merged: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The effective weight, without dropout."""
        factors = self.shared[0].current
        core = self.current["core"].unflatten(0, (-1, self.rank)).unflatten(2, (-1, self.rank))
        change = torch.einsum("or,arbs,si->aobi", factors["out"], core, factors["in"])
        return self.base.weight + self.scale * change.reshape(self.base.weight.shape)

    def merge(self, is_merged: bool) -> None:
        """Merge the current change into the weight, or undo that."""
        self._merged = (self.weight, self.base.bias) if is_merged else None

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """The effective weight, and the bias."""
        bias = self.base.bias
        return {"weight": self.weight} if bias is None else {"weight": self.weight, "bias": bias}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._merged is not None:
            layer = self.base.base if isinstance(self.base, TunedLayer) else self.base
            return apply_layer(layer, x, *self._merged)
        factors, dropout = self.shared[0].current, self.shared[1]
        narrow = F.linear(x.unflatten(-1, (-1, factors["in"].shape[1])), factors["in"]).flatten(-2)
        narrow = dropout(F.linear(narrow, self.current["core"]))
        wide = F.linear(narrow.unflatten(-1, (-1, self.rank)), self.scale * factors["out"])
        y: torch.Tensor = self.base(x)
        return y + wide.flatten(-2)


def _sites(site: Site, spec: Fact) -> dict[str, nn.Linear]:
    """The layers that change, in the model's order. Raises BackboneError."""
    linear = {name: layer for name, layer in site.layers.items() if isinstance(layer, nn.Linear)}
    leaves = {name: name.rpartition(".")[2] for name in linear}
    unknown = [target for target in spec.targets if target not in leaves.values()]
    if unknown:
        known = ", ".join(sorted(set(leaves.values()))) or "no Linear layers"
        raise BackboneError(
            f"recipe.fact.targets: given {unknown[0]!r}, which matches no Linear layer of"
            f" {type(site.model).__name__}; it has {known}"
        )
    chosen = {name: layer for name, layer in linear.items() if leaves[name] in spec.targets}
    for name, layer in chosen.items():
        if max(layer.weight.shape) % width_of(layer):
            raise BackboneError(
                f"recipe.fact.targets: {name!r} has {layer.in_features} inputs and "
                f"{layer.out_features} outputs; expected one to be a multiple of the other"
            )
    return chosen


def width_of(layer: nn.Linear) -> int:
    """The width D of the pieces that a layer is cut into."""
    return min(layer.weight.shape)


@register
class FactPart(Part):
    """One tensor train for the changes of all layers of one width."""

    name, pack_order, stage = "fact", 7, Stage.FACTORS

    def plan(self, spec: Fact, site: Site) -> list[PlannedTensor]:
        """Two factors per width, a core per layer. Raises BackboneError as `_sites`."""
        sites, rank = _sites(site, spec), spec.rank
        planned = []
        for width in sorted({width_of(layer) for layer in sites.values()}):
            prefix = f"fact.width{width}"
            planned += [
                PlannedTensor("adapters", f"{prefix}.in", (rank, width), spec.bits, start="linear"),
                PlannedTensor("adapters", f"{prefix}.out", (width, rank), spec.bits, start="up"),
            ]
        for name, layer in sites.items():
            outputs, inputs = (rank * size // width_of(layer) for size in layer.weight.shape)
            core = (outputs, inputs)
            planned.append(
                PlannedTensor("adapters", f"fact.{name}.core", core, spec.bits, start="linear")
            )
        return planned

    def attach(self, spec: Fact, assembly: Assembly) -> None:
        """Wrap the layers, which may be wrapped already."""
        dropout = assembly.dropout(self.name, spec.dropout)
        for name, layer in _sites(assembly.site, spec).items():
            address = f"fact.width{width_of(layer)}"
            factors = assembly.modules.setdefault(address, SharedFactors())
            assert isinstance(factors, SharedFactors)
            base = assembly.model.get_submodule(name)
            assert isinstance(base, nn.Linear | TunedLayer)
            changed = FactorisedLayer(base, factors, spec, dropout)
            assembly.modules[f"fact.{name}"] = changed
            assembly.model.set_submodule(name, changed)

    def mix(self, network: SharedNetwork) -> Mixing:
        """Add the changes to the outputs of the layers, where all are called as layers."""
        if weight_reader(network.site.model) is not None:
            return Mixing.APART
        for name, layer in network.site.layers.items():
            if isinstance(layer, nn.Linear):
                add = partial(_add, name, f"fact.width{width_of(layer)}")
                network.after(self, f"fact.{name}.core", network.model.get_submodule(name), add)
        return Mixing.FREELY


def _add(name: str, shared: str, lane: Lane, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A layer's output, a tensor of its own, with its change in factors."""
    in_SRD, out_SDR = lane.values(f"{shared}.in"), lane.values(f"{shared}.out")
    core_S, rank = lane.values(f"fact.{name}.core"), lane.spec.rank
    samples, width = len(in_SRD), in_SRD.shape[2]
    narrow = x.reshape(samples, -1, width) @ in_SRD.mT
    narrow = narrow.reshape(samples, -1, core_S.shape[2]) @ core_S.mT
    wide = narrow.reshape(samples, -1, rank) @ out_SDR.mT
    return y.add_(wide.reshape(y.shape), alpha=lane.spec.scale)
