"""What a pack holds, decoded for its backbone: every tensor that its recipe plans, and the places
of its connections. A pack of another backbone, or that contradicts its recipe, is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import ValidationError

from pipeline.adaptation.part import Site
from pipeline.adaptation.recipe_plan import PlannedTensor, plan_head, plan_parts
from pipeline.adaptation.selected.ranking import RankedIndices, kept_at
from pipeline.adaptation.selected.recomputed import is_recomputable, recompute
from pipeline.adaptation.sites import weight_shapes
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError, PackBackboneMismatch, PackDamaged
from pipeline.packs import Pack, PackMetadata, TensorSpec
from pipeline.specs import Recipe, Selection

_Section = TypeVar("_Section", Recipe, Selection)


@dataclass(frozen=True, eq=False)
class DecodedPack:
    """`values` are in the plan's order; `parts` are the tensors of each part, by its name in a
    recipe, and of the `head`.
    """

    metadata: PackMetadata
    recipe: Recipe
    selected: Mapping[str, RankedIndices] | None
    values: Mapping[PlannedTensor, torch.Tensor]
    parts: Mapping[str, Sequence[PlannedTensor]]


def decode(pack: Pack, backbone: LoadedBackbone) -> DecodedPack:
    """Dequantise a pack and check it against its recipe on its backbone.

    Raises:
        PackBackboneMismatch: the backbone's tensors are not those the pack was trained on.
        PackDamaged: the pack's parts are not those its recipe plans.
    """
    meta = pack.metadata
    check_backbone(meta, backbone)
    recipe = _valid(Recipe, meta.recipe, "recipe")
    stored = {(part.name, spec.name): (part, spec) for part in pack.parts for spec in part.tensors}
    spec = _valid(Selection, meta.selection, "selection")
    selected = _selected(pack, recipe, spec, backbone)
    site = Site(backbone, recipe, selected if spec.level == "network" else None)
    try:
        parts = {part.name: tensors for part, tensors in plan_parts(site).items()}
        parts["head"] = plan_head(backbone, len(meta.classes), recipe)
    except BackboneError as error:
        raise PackDamaged(f"the pack's recipe has no place on its backbone: {error}") from None
    planned = [tensor for tensors in parts.values() for tensor in tensors]
    layers = {
        (part.name, spec.name): layer
        for part in pack.parts
        for spec, layer in zip(part.tensors, part.layers, strict=False)
    }
    frozen = _biases_left_frozen(planned, stored.keys(), backbone)
    _compare(
        [tensor for tensor in planned if tensor not in frozen],
        {
            key: (spec, part.bits, layers.get(key), part.codebook, part.by_row)
            for key, (part, spec) in stored.items()
        },
    )
    arrays = {
        (part.name, name): array for part in pack.parts for name, array in part.values().items()
    }
    values = {
        tensor: torch.zeros(tensor.shape)
        if tensor in frozen
        else torch.from_numpy(arrays[tensor.part, tensor.name])
        for tensor in planned
    }
    return DecodedPack(meta, recipe, selected, values, parts)


def _biases_left_frozen(
    planned: Sequence[PlannedTensor], stored: Collection[tuple[str, str]], backbone: LoadedBackbone
) -> set[PlannedTensor]:
    """The biases of no layer, for a pack that has none: earlier versions trained those of
    layers only.
    """
    layers = weight_shapes(backbone.model).keys()
    others = {each for each in planned if each.part == "biases" and each.name not in layers}
    return set() if any((each.part, each.name) in stored for each in others) else others


def check_backbone(meta: PackMetadata, backbone: LoadedBackbone) -> None:
    """Raise PackBackboneMismatch unless the backbone's tensors and its input are the pack's."""
    wanted = meta.backbone
    if wanted["fingerprint"] != backbone.fingerprint:
        raise PackBackboneMismatch(
            f"this pack of task {meta.task!r} needs the backbone {wanted['model']} with fingerprint"
            f" {wanted['fingerprint'][:16]}..., given one with {backbone.fingerprint[:16]}...;"
            f" {_first_difference(wanted['trail'], backbone)}; give the checkpoint it was"
            " trained on"
        )
    if misfit := backbone.takes.misfit(meta.input.model_dump()):
        raise PackBackboneMismatch(f"the pack of task {meta.task!r} {misfit}")


def _first_difference(trail: str, backbone: LoadedBackbone) -> str:
    """The first tensor after which the two hashes differ. One time in 256 the digits are equal by
    chance, and the next tensor is named.
    """
    if len(trail) != len(backbone.trail):
        return f"it has {len(trail) // 2} tensors, the one given {len(backbone.trail) // 2}"
    for number, name in enumerate(sorted(backbone.state)):
        if trail[2 * number : 2 * number + 2] != backbone.trail[2 * number : 2 * number + 2]:
            return f"the first tensor that differs is {name}"
    return "the last tensor differs"


def _selected(
    pack: Pack, recipe: Recipe, spec: Selection, backbone: LoadedBackbone
) -> dict[str, RankedIndices] | None:
    """The pack's connections: stored in it, or recomputed from the backbone if it says so."""
    if recipe.connections is None:
        return None
    top_k = recipe.connections.top_k
    if any(part.recomputed for part in pack.parts):
        if not is_recomputable(spec):
            raise PackDamaged(
                f"the pack leaves out its positions, which criterion {spec.criterion} cannot"
                " recompute"
            )
        return recompute(backbone, spec, top_k)
    stored = {
        spec.name: indices
        for part in pack.parts
        for spec, indices in zip(part.tensors, part.positions, strict=False)
    }
    expected = sum(kept_at(shape, top_k) for shape in weight_shapes(backbone.model).values())
    is_whole = spec.level == "network" and not recipe.from_block and recipe.decoder is None
    if is_whole and expected != sum(len(indices) for indices in stored.values()):
        raise PackDamaged(
            f"the pack's connections are not the {expected} that its recipe's top_k of {top_k}"
            " keeps"
        )
    return {
        name: RankedIndices.unranked(torch.from_numpy(indices)) for name, indices in stored.items()
    }


def _valid(section: type[_Section], content: Mapping[str, Any], name: str) -> _Section:
    try:
        return section.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise PackDamaged(
            f"the pack's {name} is not valid: {'.'.join(str(key) for key in fault['loc'])}:"
            f" {fault['msg']}"
        ) from None


def _compare(
    planned: Sequence[PlannedTensor], stored: Mapping[tuple[str, str], tuple[object, ...]]
) -> None:
    wanted: dict[tuple[str, str], tuple[object, ...]] = {
        (tensor.part, tensor.name): (
            TensorSpec(tensor.name, tensor.shape),
            int(tensor.bits),
            tensor.layer,
            tensor.codebook,
            tensor.by_row,
        )
        for tensor in planned
    }
    if wanted == stored:
        return
    missing, surplus = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    changed = [key for key in sorted(wanted.keys() & stored.keys()) if wanted[key] != stored[key]]
    kind, (part, name) = next(
        (kind, keys[0])
        for kind, keys in (("missing", missing), ("surplus", surplus), ("ill-shaped", changed))
        if keys
    )
    raise PackDamaged(
        f"the pack's parts are not those of its recipe: {kind} {part} {name!r}; it was written by"
        " other code or changed afterwards"
    )
