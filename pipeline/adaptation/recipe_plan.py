"""Plan what a recipe attaches to a backbone before anything is built: modules, shapes, bits, bytes.

Layers and blocks are found by module type (see `sites`), so that ViT, Swin and ConvNeXt share the
code. A part that matches nothing is an error.
"""

from __future__ import annotations

from dataclasses import replace

import pipeline.adaptation.parts  # noqa: F401 - registers the parts
from pipeline.adaptation.map_head import fused_width
from pipeline.adaptation.part import Part, Site, parts_of
from pipeline.adaptation.selected.ranking import SelectedIndex
from pipeline.adaptation.sites import tunable_layers
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError
from pipeline.specs import Bits, Head, Quantiser, Recipe

__all__ = ["PlannedTensor", "plan", "plan_head", "plan_parts", "tunable_layers"]


def plan(
    backbone: LoadedBackbone,
    recipe: Recipe,
    class_count: int,
    selected: SelectedIndex | None = None,
) -> tuple[PlannedTensor, ...]:
    """Every tensor the recipe trains, in the order a pack stores them.

    Args:
        selected: gives the number of connections of each layer. Without it, K per neuron are
            assumed, which is exact at every level but network.

    Raises:
        BackboneError: a part of the recipe matches no module of this backbone, or the head's rank
            exceeds its feature.
    """
    parts = plan_parts(Site(backbone, recipe, selected))
    head = plan_head(backbone, class_count, recipe)
    return (*(tensor for tensors in parts.values() for tensor in tensors), *head)


def plan_parts(site: Site) -> dict[Part, list[PlannedTensor]]:
    """The tensors of each part, in the order of a pack. Raises BackboneError as `plan`."""
    planned = {part: part.plan(spec, site) for part, spec in parts_of(site.recipe)}
    for part, tensors in planned.items():
        if not tensors:
            raise BackboneError(
                f"recipe.{part.name}: nothing in {type(site.model).__name__} matches it;"
                f" {part.needs}; leave this part out"
            )
    quantiser = site.recipe.quantiser or Quantiser()
    return {
        part: [_stored_as(each, quantiser) for each in tensors] for part, tensors in planned.items()
    }


def plan_head(backbone: LoadedBackbone, class_count: int, recipe: Recipe) -> list[PlannedTensor]:
    """The head's tensors: its weight and, where it has one, its bias; of one that fuses maps, also
    those of its decoder. Raises BackboneError as `plan`.
    """
    spec: Head = recipe.head
    fused: list[PlannedTensor] = []
    width = backbone.width
    if spec.fuse is not None:
        _check_can_fuse(backbone)
        width = fused_width(backbone)
    if spec.rank is not None and spec.rank > width:
        raise BackboneError(
            f"recipe.head.rank: given {spec.rank}, but the backbone's feature has {width} numbers;"
            f" expected at most {width}; leave it out to use the whole feature"
        )
    if spec.fuse is not None:
        reduced = (spec.fuse, spec.rank or width)
        fused = [
            PlannedTensor("head", "head.reduce", reduced, spec.bits, start="fan_in"),
            PlannedTensor("head", "head.mix", (spec.fuse, 9), spec.bits, start="near_zero"),
        ]
    shape = (class_count, spec.fuse or spec.rank or width)
    weight = PlannedTensor("head", "head.weight", shape, spec.bits, start="head")
    bias_bits: Bits = 32 if spec.bits == 32 else 16
    bias = [PlannedTensor("head", "head.bias", (class_count,), bias_bits)] if spec.bias else []
    tensors = (*fused, weight, *bias)
    return [_stored_as(tensor, recipe.quantiser or Quantiser()) for tensor in tensors]


def _check_can_fuse(backbone: LoadedBackbone) -> None:
    """Raise BackboneError where there are no maps for a head that fuses some."""
    if backbone.gives_maps and not backbone.has_decoder:
        return
    what = "a mask decoder" if backbone.has_decoder else "one pooled feature"
    raise BackboneError(
        f"recipe.head.fuse: {backbone.spec.model} gives this task the output of {what}; a head that"
        " fuses maps is for segmentation on a backbone without a decoder; leave fuse out"
    )


def _stored_as(tensor: PlannedTensor, spec: Quantiser) -> PlannedTensor:
    """The tensor with the recipe's quantiser settings, if it has codes.

    A mean of connections of one bit is noise: benchmarks/scales.py.
    """
    if tensor.bits >= 16:
        return tensor
    has_mean = tensor.part != "connections" or tensor.bits > 1
    by_row = spec.scales == "row" and len(tensor.shape) > 1
    return replace(tensor, codebook=spec.codebook, by_row=by_row, has_mean=has_mean)
