"""LoRA: low-rank changes of chosen projections (arXiv 2106.09685; low-bit form: Binary Adapter,
arXiv 2307.16867).

    y[rows] = (W x)[rows] + scale * up(dropout(down(x)))        down is [R, I], up [rows, R]

There is no activation and there are no biases.

timm fuses the projections of q, k and v into one Linear `qkv` of 3 D rows: q, k and v name its
thirds, where they are laid out so (fused.py). All low-rank changes of one layer take two matrix
products: their `down`s are stacked, and each `up` is padded with zeros to the layer's rows.
Shapes: I inputs, O outputs, R rank, S ranks of all the layer's changes together.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.adaptation.dropout import SeededDropout
from pipeline.adaptation.fused import in_thirds
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
from pipeline.adaptation.sites import TunableLayer, apply_layer, weight_reader
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.adaptation.wrapper import Wrapper
from pipeline.errors import BackboneError
from pipeline.specs import Lora

if TYPE_CHECKING:
    from pipeline.adaptation.lanes import Lane

Rows = tuple[int, int]
"""First row, and the one after the last."""


class LowRankLayer(Wrapper, WeightChange):
    """A layer with low-rank changes. `current` holds `<target>.down` [R, I] and `<target>.up`
    [rows, R] of this forward pass.
    """

    base: TunableLayer | TunedLayer

    def __init__(
        self,
        base: TunableLayer | TunedLayer,
        outputs: int,
        rows: Mapping[str, Rows],
        spec: Lora,
        dropout: SeededDropout,
    ) -> None:
        super().__init__(base)
        self.outputs, self.rows, self.scale = outputs, dict(rows), spec.scale
        self._merged: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.dropout = [
            dropout
        ]  # in a list: its mode is set in one place, not by the frozen network around this layer
        self.current: dict[str, torch.Tensor] = {}

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`down` [S, I] and `up` [O, S] of all changes together."""
        down_SI = torch.cat([self.current[f"{target}.down"] for target in self.rows])
        ups = [
            F.pad(self.current[f"{target}.up"], (0, 0, first, self.outputs - end))
            for target, (first, end) in self.rows.items()
        ]
        return down_SI, self.scale * torch.cat(ups, dim=1)

    @property
    def weight(self) -> torch.Tensor:
        """The effective weight, for blocks that use a layer's weight themselves (SwinV2, BEiT);
        without dropout.
        """
        down_SI, up_OS = self.matrices()
        return self.base.weight + (up_OS @ down_SI).view(self.base.weight.shape)

    def merge(self, is_merged: bool) -> None:
        """Merge the current changes into the weight, so that a forward pass is the plain layer's,
        or undo that.
        """
        self._merged = (self.weight, self.base.bias) if is_merged else None

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """The effective weight, and the bias."""
        bias = self.base.bias
        return {"weight": self.weight} if bias is None else {"weight": self.weight, "bias": bias}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.base.base if isinstance(self.base, TunedLayer) else self.base
        if self._merged is not None:
            return apply_layer(layer, x, *self._merged)
        y: torch.Tensor = self.base(x)
        is_convolution = isinstance(layer, nn.Conv2d)
        if is_convolution:
            x, y = x.movedim(1, -1), y.movedim(1, -1)
        down_SI, up_OS = self.matrices()
        hidden_TS = self.dropout[0](F.linear(x.reshape(-1, x.shape[-1]), down_SI))
        y = torch.addmm(y.reshape(-1, self.outputs), hidden_TS, up_OS.T).view(y.shape)
        return y.movedim(-1, 1) if is_convolution else y


def convolution_targets(model: nn.Module) -> tuple[str, ...]:
    """The targets that are 1x1 convolutions of a model, sorted."""
    layers = [(name, layer) for name, layer in model.named_modules() if _is_pointwise(layer)]
    return tuple(sorted({name.rpartition(".")[2] for name, _ in layers}))


def _is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer is a 1x1 convolution that is one matrix for all places."""
    return isinstance(layer, nn.Conv2d) and (
        (layer.kernel_size, layer.stride) == ((1, 1), (1, 1))
        and (layer.groups, layer.padding) == (1, (0, 0))
    )


def _possible_targets(site: Site) -> dict[str, list[tuple[str, TunableLayer, Rows]]]:
    """For each name a target can have: the layers it matches, and which of their rows."""
    found: dict[str, list[tuple[str, TunableLayer, Rows]]] = {}
    for name, layer in site.layers.items():
        if isinstance(layer, nn.Conv2d) and not _is_pointwise(layer):
            continue
        leaf, outputs = name.rpartition(".")[2], layer.weight.shape[0]
        found.setdefault(leaf, []).append((name, layer, (0, outputs)))
        if in_thirds(site.backbone).get(name):
            for index, third in enumerate("qkv"):
                found.setdefault(third, []).append(
                    (name, layer, (index * outputs // 3, (index + 1) * outputs // 3))
                )
    return found


def _sites(site: Site, spec: Lora) -> dict[str, tuple[TunableLayer, dict[str, Rows]]]:
    """The layers that change, in the model's order, each with the rows of its targets."""
    possible = _possible_targets(site)
    mixed = [name for name, is_in_thirds in in_thirds(site.backbone).items() if not is_in_thirds]
    thirds = [target for target in spec.targets if target in ("q", "k", "v")]
    if mixed and thirds:
        raise BackboneError(
            f"recipe.lora.targets: given {thirds[0]!r}; the rows of {mixed[0]!r} in"
            f" {type(site.model).__name__} are not laid out as q, k and v in thirds; name the whole"
            " layer, qkv"
        )
    unknown = [target for target in spec.targets if target not in possible]
    if unknown:
        known = ", ".join(sorted(possible)) or "no Linear and no 1x1 convolution"
        raise BackboneError(
            f"recipe.lora.targets: given {unknown[0]!r}, which matches no layer of"
            f" {type(site.model).__name__}; it has {known}"
        )
    chosen: dict[str, tuple[TunableLayer, dict[str, Rows]]] = {}
    for target in spec.targets:
        for name, layer, rows in possible[target]:
            chosen.setdefault(name, (layer, {}))[1][target] = rows
    return {name: chosen[name] for name in site.layers if name in chosen}


def _wrapped(layer: nn.Module) -> TunableLayer | TunedLayer:
    assert isinstance(layer, nn.Linear | nn.Conv2d | TunedLayer)
    return layer


@register
class LoraPart(Part):
    """Low-rank changes of chosen layers."""

    name, pack_order, stage = "lora", 6, Stage.FACTORS

    def plan(self, spec: Lora, site: Site) -> list[PlannedTensor]:
        """Two matrices per target and layer. Raises BackboneError as `_sites`."""
        planned = []
        for name, (layer, targets) in _sites(site, spec).items():
            down = (spec.rank, layer.weight.shape[1])
            for target, (first, end) in targets.items():
                prefix, up = f"lora.{name}.{target}", (end - first, spec.rank)
                planned += [
                    PlannedTensor("adapters", f"{prefix}.down", down, spec.bits, start="linear"),
                    PlannedTensor("adapters", f"{prefix}.up", up, spec.bits, start="up"),
                ]
        return planned

    def attach(self, spec: Lora, assembly: Assembly) -> None:
        """Wrap the layers, which may be wrapped already."""
        dropout = assembly.dropout(self.name, spec.dropout)
        for name, (layer, rows) in _sites(assembly.site, spec).items():
            base = _wrapped(assembly.model.get_submodule(name))
            changed = LowRankLayer(base, layer.weight.shape[0], rows, spec, dropout)
            assembly.modules[f"lora.{name}"] = changed
            assembly.model.set_submodule(name, changed)

    def mix(self, network: SharedNetwork) -> Mixing:
        """Add the changes to the outputs of the layers, where all are called as layers."""
        if weight_reader(network.site.model) is not None:
            return Mixing.APART
        for target, layers in _possible_targets(network.site).items():
            for name, layer, rows in layers:
                prefix, module = f"lora.{name}.{target}", network.model.get_submodule(name)
                add = partial(_add, prefix, rows, isinstance(layer, nn.Conv2d))
                network.after(self, f"{prefix}.down", module, add)
        return Mixing.FREELY


def _add(
    prefix: str, rows: Rows, is_convolution: bool, lane: Lane, y: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """A layer's output, a tensor of its own, with the low-rank changes of some of its rows."""
    down_SRI, up_SOR = lane.values(f"{prefix}.down"), lane.values(f"{prefix}.up")
    changed = y
    if is_convolution:
        x, y = x.movedim(1, -1), y.movedim(1, -1)
    x_STI = x.reshape(len(down_SRI), -1, x.shape[-1])
    change_STO = lane.spec.scale * (x_STI @ down_SRI.mT @ up_SOR.mT)
    y[..., slice(*rows)] += change_STO.view(*y.shape[:-1], -1)
    return changed
