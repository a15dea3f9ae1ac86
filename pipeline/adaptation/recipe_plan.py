"""What a recipe attaches to a backbone, known before anything is built: modules, shapes, bits, bytes.

Layers and blocks are found by module type (see `sites`), so that ViT, Swin and ConvNeXt share the code. A part that matches nothing is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from pipeline.adaptation.blocks import MlpSlot, mlp_slots
from pipeline.adaptation.parts.bottleneck import plan_adapter
from pipeline.adaptation.parts.full import plan_full
from pipeline.adaptation.parts.lora import plan_lora
from pipeline.adaptation.parts.prompts import plan_class_token, plan_generator, plan_prompts
from pipeline.adaptation.parts.smoa import plan_smoa
from pipeline.adaptation.parts.ssf import plan_ssf
from pipeline.adaptation.selected.ranking import SelectedIndex, kept_at, kept_places
from pipeline.adaptation.sites import norms_of, tunable_layers, weight_shapes
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError
from pipeline.specs import Biases, Bits, Connections, Head, Norms, Quantiser, Recipe

__all__ = ["PlannedTensor", "plan", "tunable_layers"]


def plan(backbone: LoadedBackbone, recipe: Recipe, class_count: int, selected: SelectedIndex | None = None) -> tuple[PlannedTensor, ...]:
    """Every tensor the recipe trains, in the order a pack stores them.

    Args:
        selected: says how many connections each layer keeps. Without it, as many as K of every neuron are, which holds at every level but network.

    Raises:
        BackboneError: a part of the recipe matches no module of this backbone.
    """
    model = backbone.model
    slots = mlp_slots(backbone) if recipe.smoa or recipe.adapter or recipe.norms else []
    parts = {
        "connections": recipe.connections and _plan_connections(model, recipe.connections, selected),
        "biases": recipe.biases and _plan_biases(model, recipe.biases),
        "norms": recipe.norms and _plan_norms(model, slots, recipe.norms),
        "smoa": recipe.smoa and plan_smoa(slots, recipe.smoa),
        "adapter": recipe.adapter and plan_adapter(slots, recipe.adapter, type(model).__name__),
        "lora": recipe.lora and plan_lora(backbone, recipe.lora),
        "ssf": recipe.ssf and plan_ssf(backbone, recipe.ssf),
        "prompts": recipe.prompts and plan_prompts(model, recipe.prompts),
        "class_token": recipe.class_token and plan_class_token(model, recipe.class_token),
        "smoa.prompt_generator": plan_generator(model, recipe.smoa.bits) if recipe.smoa and recipe.smoa.prompt_generator else None,
        "full": recipe.full and plan_full(model, recipe.full),
    }
    for part, tensors in parts.items():
        if tensors is not None and not tensors:
            raise BackboneError(f"recipe.{part}: nothing in {type(model).__name__} matches it; {_WANTED[part]}; leave this part out")
    planned = [*(tensor for tensors in parts.values() for tensor in tensors or ()), *_plan_head(backbone.width, class_count, recipe.head)]
    return tuple(_stored_as(tensor, recipe.quantiser or Quantiser()) for tensor in planned)


def _stored_as(tensor: PlannedTensor, spec: Quantiser) -> PlannedTensor:
    """The tensor with the recipe's way of rounding, where it is rounded to codes. A mean of connections of one bit is noise: benchmarks/scales.py."""
    if tensor.bits >= 16:
        return tensor
    has_mean = tensor.part != "connections" or tensor.bits > 1
    return replace(tensor, codebook=spec.codebook, by_row=spec.scales == "row" and len(tensor.shape) > 1, has_mean=has_mean)


_MLP_BLOCKS = "it needs blocks with a norm next to an MLP (a child named mlp)"
_WANTED = {
    "connections": "it needs Linear or Conv2d layers",
    "biases": "it needs Linear or Conv2d layers with a bias",
    "norms": f"{_MLP_BLOCKS}, or `which: all`",
    "smoa": _MLP_BLOCKS,
    "adapter": _MLP_BLOCKS,
    "ssf": "it needs Linear, Conv2d or norm layers",
    "smoa.prompt_generator": "it needs two blocks or more",
}


def _plan_connections(model: nn.Module, spec: Connections, selected: SelectedIndex | None) -> list[PlannedTensor]:
    shapes = weight_shapes(model)
    counts = {name: kept_at(shape, spec.top_k) for name, shape in shapes.items()}
    if selected is not None:
        counts = {name: len(place_N) for name, place_N in kept_places(selected, spec.top_k).items()}
    return [PlannedTensor("connections", name, (counts[name],), spec.bits, shape) for name, shape in shapes.items() if name in counts]


def _plan_biases(model: nn.Module, spec: Biases) -> list[PlannedTensor]:
    layers = tunable_layers(model).items()
    return [PlannedTensor("biases", name, tuple(layer.bias.shape), spec.bits) for name, layer in layers if layer.bias is not None]


def _plan_norms(model: nn.Module, slots: Sequence[MlpSlot], spec: Norms) -> list[PlannedTensor]:
    return [
        PlannedTensor("norms", f"{norm}.{name}", tuple(tensor.shape), spec.bits)
        for norm in norm_names(model, slots, spec)
        for name, tensor in norm_parameters(model.get_submodule(norm), spec).items()
    ]


def norm_names(model: nn.Module, slots: Sequence[MlpSlot], spec: Norms) -> list[str]:
    """The norms that train."""
    return list(norms_of(model)) if spec.which == "all" else [f"{slot.block}.{slot.norm}" for slot in slots]


def norm_parameters(norm: nn.Module, spec: Norms) -> dict[str, nn.Parameter]:
    """Those of a norm's parameters that train."""
    return {name: tensor for name, tensor in norm.named_parameters() if spec.parameters in ("all", name)}


def _plan_head(width: int, class_count: int, spec: Head) -> list[PlannedTensor]:
    weight = PlannedTensor("head", "head.weight", (class_count, width), spec.bits, start="head")
    bias_bits: Bits = 32 if spec.bits == 32 else 16
    return [weight, PlannedTensor("head", "head.bias", (class_count,), bias_bits)] if spec.bias else [weight]
