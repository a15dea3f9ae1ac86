"""What a recipe attaches to a backbone, known before anything is built: modules, shapes, bits, bytes.

Layers are found by module type (Linear and Conv2d for connections and biases; a block with an `mlp` behind a norm for SMoA and norms), never by
model name, so that ViT, Swin and ConvNeXt share the code. A part that matches nothing is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pipeline.adaptation.connections import TunableLayer
from pipeline.adaptation.smoa import bank_shapes
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError
from pipeline.packs import PartName
from pipeline.spec import Bits, Recipe

HEAD_BIAS_BITS: Bits = 16


@dataclass(frozen=True)
class PlannedTensor:
    """One trained tensor. `layer` is (neurons, inputs of a neuron) of the layer whose connections these are, None for other parts."""

    part: PartName
    name: str
    shape: tuple[int, ...]
    bits: Bits
    layer: tuple[int, int] | None = None

    @property
    def values(self) -> int:
        """Number of trained values."""
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """Number of trailing 2-D matrices, each with a mean and an sd of its own; a vector is one."""
        return math.prod(self.shape[:-2])


@dataclass(frozen=True)
class MlpSlot:
    """A block with an MLP behind a norm: where SMoA and trained norms attach."""

    block: str
    norm: str
    width: int
    channels_first: bool


def tunable_layers(model: nn.Module) -> dict[str, TunableLayer]:
    """Every Linear and Conv2d of a backbone, by name, in order of definition.

    Subclasses are left alone: they standardise their weight, or pad by the input's size, which a plain layer on another weight would not do. So are
    convolutions that pad by a rule ("same") or with anything but zeros.
    """
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear or _is_plain_convolution(module)}  # type: ignore[misc]


def _is_plain_convolution(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and not isinstance(module.padding, str) and module.padding_mode == "zeros"


def mlp_slots(model: nn.Module) -> list[MlpSlot]:
    """Every block with an `mlp` and a norm next to it: before it (ViT, Swin, ConvNeXt) or, in post-norm blocks (SwinV2), after it."""
    slots = []
    for name, block in model.named_modules():
        first = getattr(getattr(block, "mlp", None), "fc1", None)
        norm = next((key for key in ("norm2", "norm") if isinstance(getattr(block, key, None), nn.Module)), None)
        if isinstance(first, nn.Linear | nn.Conv2d) and norm is not None:
            slots.append(MlpSlot(name, norm, int(first.weight.shape[1]), isinstance(first, nn.Conv2d)))
    return slots


def columns_of(layer: TunableLayer) -> int:
    """Number of input connections of one neuron."""
    return layer.weight[0].numel()


def plan(backbone: LoadedBackbone, recipe: Recipe, class_count: int) -> tuple[PlannedTensor, ...]:
    """Every tensor the recipe trains, in the order a pack stores them.

    Raises:
        BackboneError: a part of the recipe matches no module of this backbone.
    """
    model = backbone.model
    parts = {
        "connections": _plan_connections(model, recipe),
        "biases": _plan_biases(model, recipe),
        "norms": _plan_norms(model, recipe),
        "smoa": _plan_smoa(model, recipe),
    }
    for part, tensors in parts.items():
        if getattr(recipe, part) is not None and not tensors:
            raise BackboneError(f"recipe.{part}: nothing in {type(model).__name__} matches it; {_WANTED[part]}; leave this part out")
    head = (
        PlannedTensor("head", "head.weight", (class_count, backbone.width), recipe.head.bits),
        PlannedTensor("head", "head.bias", (class_count,), HEAD_BIAS_BITS),
    )
    return (*(tensor for tensors in parts.values() for tensor in tensors), *head)


_WANTED = {
    "connections": "it needs Linear or Conv2d layers",
    "biases": "it needs Linear or Conv2d layers with a bias",
    "norms": "it needs blocks with a norm before an MLP (mlp.fc1)",
    "smoa": "it needs blocks with a norm before an MLP (mlp.fc1)",
}


def _plan_connections(model: nn.Module, recipe: Recipe) -> Sequence[PlannedTensor]:
    if recipe.connections is None:
        return ()
    top_k, bits = recipe.connections.top_k, recipe.connections.bits
    layers = [(name, layer.weight.shape[0], columns_of(layer)) for name, layer in tunable_layers(model).items()]
    return [PlannedTensor("connections", name, (rows * min(top_k, columns),), bits, (rows, columns)) for name, rows, columns in layers]


def _plan_biases(model: nn.Module, recipe: Recipe) -> Sequence[PlannedTensor]:
    if recipe.biases is None:
        return ()
    layers = tunable_layers(model).items()
    return [PlannedTensor("biases", name, tuple(layer.bias.shape), recipe.biases.bits) for name, layer in layers if layer.bias is not None]


def _plan_norms(model: nn.Module, recipe: Recipe) -> Sequence[PlannedTensor]:
    if recipe.norms is None:
        return ()
    return [
        PlannedTensor("norms", f"{slot.block}.{slot.norm}.{name}", tuple(tensor.shape), recipe.norms.bits)
        for slot in mlp_slots(model)
        for name, tensor in model.get_submodule(f"{slot.block}.{slot.norm}").named_parameters()
    ]


def _plan_smoa(model: nn.Module, recipe: Recipe) -> Sequence[PlannedTensor]:
    if recipe.smoa is None:
        return ()
    widths = sorted({slot.width for slot in mlp_slots(model)})
    return [
        PlannedTensor("adapters", f"smoa.{width}.{name}", shape, recipe.smoa.bits)
        for width in widths
        for name, shape in bank_shapes(width, recipe.smoa).items()
    ]
