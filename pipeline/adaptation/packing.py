"""Convert an adapted model to a pack and back."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import ValidationError

from pipeline.adaptation.attach import AdaptedModel, attach
from pipeline.adaptation.recipe_plan import PlannedTensor, plan
from pipeline.adaptation.selected.ranking import (
    RankedIndices,
    SelectedIndex,
    kept_at,
    kept_indices,
    rank_indices,
)
from pipeline.adaptation.selected.recomputed import is_recomputable, recompute
from pipeline.adaptation.sites import weight_shapes
from pipeline.backbones import LoadedBackbone
from pipeline.errors import PackBackboneMismatch, PackDamaged
from pipeline.packs import (
    Pack,
    PackBackbone,
    PackInput,
    PackMetadata,
    Part,
    PartBits,
    PartName,
    TensorSpec,
    largest_size_bytes,
    ledger,
    zero_part,
)
from pipeline.specs import Recipe, Selection, Task, Training

_Section = TypeVar("_Section", Recipe, Selection)
PROBE_IMAGES = 2
_COUNT_BYTES = 8
"""Largest number of bytes for a layer's connection count in a pack's description."""
_LENGTH_BYTES = 4
"""Largest growth in bytes of the compressed description when its positions take another number of
bytes.
"""
PROBE_TOLERANCE = 0.02
"""Tolerance for probe logits computed on other hardware, as a fraction of the largest logit, or of
1 if all are smaller.
"""


def describe(
    task: Task, recipe: Recipe, backbone: LoadedBackbone, classes: Sequence[str]
) -> PackMetadata:
    """The metadata of a pack, all of which is known before training."""
    return PackMetadata(
        task=task.name,
        classes=list(classes),
        kind=task.kind,
        metric=task.metric,
        input=PackInput(
            size_px=backbone.size_px, mean=backbone.mean, std=backbone.std, interpolation="bicubic"
        ),
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        backbone=PackBackbone(
            model=task.backbone.model,
            arguments=dict(task.backbone.arguments),
            fingerprint=backbone.fingerprint,
            trail=backbone.trail,
        ),
        selection=task.selection.model_dump() if recipe.connections else {},
        seed=task.seed,
    )


class SizePlanner:
    """Predicts the pack sizes of recipes before anything is trained.

    Sizes are exact if the task's selection is known or positions are not stored. Otherwise the
    cheapest positions are assumed, and the size is a lower bound.
    """

    def __init__(
        self,
        task: Task,
        backbone: LoadedBackbone,
        classes: Sequence[str],
        selected: SelectedIndex | None = None,
    ) -> None:
        self._task, self._backbone, self._classes, self._selected = (
            task,
            backbone,
            classes,
            selected,
        )
        self._connections: dict[str, tuple[SelectedIndex, Part]] = {}
        self._same_places: dict[int, Part] = {}

    def size_bytes(self, recipe: Recipe) -> int:
        """Size of the pack."""
        return sum(self.ledger(recipe).values())

    def is_exact(self, recipe: Recipe) -> bool:
        """Whether the recipe's size is exact rather than bounded."""
        return (
            recipe.connections is None
            or self._selected is not None
            or is_recomputable(self._task.selection)
        )

    def largest_bytes(self, recipe: Recipe) -> int:
        """Upper bound of the recipe's pack size, over all selections."""
        if self.is_exact(recipe):
            return self.size_bytes(recipe)
        assert recipe.connections is not None
        level = self._task.selection.level
        planner, slack = self, 0
        if level == "network":  # the first layers would keep everything
            spread = rank_indices(self._equal_importance(), "layer", recipe.connections.top_k)
            planner = SizePlanner(self._task, self._backbone, self._classes, spread)
            slack = _COUNT_BYTES * len(spread)
        shapes, cheapest = (
            planner._planned_connections(recipe)[1].layer_shapes,
            planner.ledger(recipe)["positions"],
        )
        largest = largest_size_bytes(
            shapes, equal_rows=level == "neuron", fixed_layers=level != "network"
        )
        return planner.size_bytes(recipe) - cheapest + largest + slack + _LENGTH_BYTES

    def ledger(self, recipe: Recipe) -> dict[str, int]:
        """Bytes by part of the pack."""
        selected, connections = (
            self._planned_connections(recipe) if recipe.connections else (None, None)
        )
        groups = _groups(plan(self._backbone, recipe, len(self._classes), selected))
        parts = [
            connections if connections and group[0].part == "connections" else _zeros(group)
            for group in groups
        ]
        probe = np.zeros((PROBE_IMAGES, len(self._classes)), np.float32)
        return ledger(
            Pack(describe(self._task, recipe, self._backbone, self._classes), tuple(parts), probe)
        )

    def _planned_connections(self, recipe: Recipe) -> tuple[SelectedIndex, Part]:
        """The selection and the part, cached, because coding positions takes longest."""
        assert recipe.connections is not None
        key = repr((recipe.connections, recipe.quantiser))
        if key not in self._connections:
            top_k, is_stored = recipe.connections.top_k, not is_recomputable(self._task.selection)
            selected = self._selected or self._assumed(top_k)
            alone = Recipe(connections=recipe.connections, quantiser=recipe.quantiser)
            group, indices = (
                _groups(plan(self._backbone, alone, 1, selected))[0],
                kept_indices(selected, top_k),
            )
            positions = (
                tuple(_as_indices(indices[tensor.name]) for tensor in group) if is_stored else ()
            )
            part = _zeros(group, positions, recomputed=not is_stored)
            vars(part)["encoded_positions"] = self._same_places.setdefault(
                top_k, part
            ).encoded_positions  # whatever the values' bits
            self._connections[key] = selected, part
        return self._connections[key]

    def _assumed(self, top_k: int) -> SelectedIndex:
        spec = self._task.selection
        if is_recomputable(spec):
            return recompute(self._backbone, spec, top_k)
        return rank_indices(self._equal_importance(), spec.level, top_k)

    def _equal_importance(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(shape) for name, shape in weight_shapes(self._backbone.model).items()
        }


def to_pack(model: AdaptedModel, metadata: PackMetadata) -> Pack:
    """Encode every trained tensor, and the logits of the probe images to check a reload by."""
    codes, positions = model.values.encode(), model.positions()
    recomputed = bool(metadata.selection) and is_recomputable(
        Selection.model_validate(metadata.selection)
    )
    parts = [_part(group, codes, positions, recomputed) for group in _groups(model.values.tensors)]
    return Pack(metadata, tuple(parts), probe_logits(model, metadata.input.size_px))


def from_pack(pack: Pack, backbone: LoadedBackbone) -> AdaptedModel:
    """Rebuild the model a pack describes on its backbone.

    Raises:
        PackBackboneMismatch: the backbone's tensors are not those the pack was trained on.
        PackDamaged: the pack's parts are not those its recipe plans, or its probe logits are not
            reproduced.
    """
    meta = pack.metadata
    _check_backbone(meta, backbone)
    recipe = _valid(Recipe, meta.recipe, "recipe")
    stored = {(part.name, spec.name): (part, spec) for part in pack.parts for spec in part.tensors}
    spec = _valid(Selection, meta.selection, "selection")
    selected = _selected(pack, recipe, spec, backbone)
    planned = plan(
        backbone, recipe, len(meta.classes), selected if spec.level == "network" else None
    )
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
    model = attach(
        backbone,
        recipe.model_copy(update={"training": Training()}),
        len(meta.classes),
        selected=selected,
    )
    values = {
        (part.name, name): array for part in pack.parts for name, array in part.values().items()
    }
    trained = [tensor for tensor in planned if tensor not in frozen]
    changes = {tensor: torch.from_numpy(values[tensor.part, tensor.name]) for tensor in trained}
    model.values.load_stored(changes | {tensor: torch.zeros(tensor.shape) for tensor in frozen})
    _check_probe(model, pack)
    return model


def _biases_left_frozen(
    planned: Sequence[PlannedTensor], stored: Collection[tuple[str, str]], backbone: LoadedBackbone
) -> set[PlannedTensor]:
    """The biases of no layer, for a pack that has none: earlier versions trained those of
    layers only.
    """
    layers = weight_shapes(backbone.model).keys()
    others = {each for each in planned if each.part == "biases" and each.name not in layers}
    return set() if any((each.part, each.name) in stored for each in others) else others


def _check_backbone(meta: PackMetadata, backbone: LoadedBackbone) -> None:
    wanted = meta.backbone
    if wanted["fingerprint"] != backbone.fingerprint:
        raise PackBackboneMismatch(
            f"this pack of task {meta.task!r} needs the backbone {wanted['model']} with fingerprint"
            f" {wanted['fingerprint'][:16]}..., given one with {backbone.fingerprint[:16]}...;"
            f" {_first_difference(wanted['trail'], backbone)}; give the checkpoint it was"
            " trained on"
        )
    if meta.input.size_px != backbone.size_px:
        raise PackBackboneMismatch(
            f"the pack of task {meta.task!r} takes {meta.input.size_px} px images, given a backbone"
            f" set to {backbone.size_px}"
        )


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
    if spec.level == "network" and expected != sum(len(indices) for indices in stored.values()):
        raise PackDamaged(
            f"the pack's connections are not the {expected} that its recipe's top_k of {top_k}"
            " keeps"
        )
    return {
        name: RankedIndices.unranked(torch.from_numpy(indices)) for name, indices in stored.items()
    }


def probe_images(size_px: int) -> np.ndarray:
    """Fixed pseudo-random images, uint8 [P, 3, S, S]."""
    return np.random.default_rng(0).integers(
        0, 256, (PROBE_IMAGES, 3, size_px, size_px), dtype=np.uint8
    )


@torch.inference_mode()
def probe_logits(model: AdaptedModel, size_px: int) -> np.ndarray:
    """Logits [P, C] of the probe images: what a reloaded pack must reproduce."""
    return model.eval()(torch.from_numpy(probe_images(size_px))).float().numpy()


def _groups(tensors: Sequence[PlannedTensor]) -> list[list[PlannedTensor]]:
    """Group consecutive tensors of one part that are stored alike."""
    return [
        list(group)
        for _, group in itertools.groupby(
            tensors, key=lambda tensor: (tensor.part, tensor.rounding, tensor.by_row)
        )
    ]


def _specs(
    group: list[PlannedTensor],
) -> tuple[PartName, PartBits, tuple[TensorSpec, ...], tuple[tuple[int, int], ...]]:
    specs = tuple(TensorSpec(tensor.name, tensor.shape) for tensor in group)
    return (
        group[0].part,
        group[0].bits,
        specs,
        tuple(tensor.layer for tensor in group if tensor.layer is not None),
    )


def _zeros(
    group: list[PlannedTensor], positions: tuple[np.ndarray, ...] = (), recomputed: bool = False
) -> Part:
    name, bits, specs, layers = _specs(group)
    return zero_part(
        name,
        bits,
        specs,
        positions,
        layers,
        recomputed,
        group[0].codebook,
        group[0].by_row,
        group[0].has_mean,
    )


def _as_indices(index_N: torch.Tensor) -> np.ndarray:
    return index_N.cpu().numpy().astype(np.int64)


def _part(
    group: list[PlannedTensor],
    encoded: Mapping[PlannedTensor, tuple[np.ndarray, np.ndarray | None]],
    positions: Mapping[str, torch.Tensor],
    recomputed: bool,
) -> Part:
    """One part of the file. Positions that readers recompute are left out."""
    name, bits, specs, layers = _specs(group)
    scales = [scale for tensor in group for scale in [encoded[tensor][1]] if scale is not None]
    return Part(
        name=name,
        bits=bits,
        tensors=specs,
        codes=np.concatenate([encoded[tensor][0] for tensor in group]),
        scales=np.concatenate(scales) if scales else None,
        positions=(
            tuple(_as_indices(positions[spec.name]) for spec in specs)
            if layers and not recomputed
            else ()
        ),
        layers=layers,
        recomputed=bool(layers) and recomputed,
        codebook=group[0].codebook,
        by_row=group[0].by_row,
        has_mean=group[0].has_mean,
    )


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


def _check_probe(model: AdaptedModel, pack: Pack) -> None:
    now = probe_logits(model, pack.metadata.input.size_px)
    worst = float(np.abs(now - pack.probe_logits).max())
    if not worst <= PROBE_TOLERANCE * max(
        1.0, float(np.abs(pack.probe_logits).max())
    ):  # not a number is refused, too
        raise PackDamaged(
            f"the reloaded model's probe logits differ by {worst:.3g} from those stored; this build"
            " computes something else than the writer"
        )
