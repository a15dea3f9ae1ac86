"""From an adapted model to a pack and back: the only place where trained tensors meet the file's parts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pydantic import ValidationError

from pipeline.adaptation.attach import AdaptedModel, attach
from pipeline.adaptation.plan import PlannedTensor, plan
from pipeline.backbones import LoadedBackbone
from pipeline.errors import PackBackboneMismatch, PackDamaged
from pipeline.packs import Pack, PackBackbone, PackInput, PackMetadata, Part, PartBits, PartName, TensorSpec, ledger, predict_size_bytes, zero_part
from pipeline.spec import Recipe, Task

PROBE_IMAGES = 2
PROBE_TOLERANCE = 0.02
"""Largest difference of a probe logit that other hardware may cause, as a share of the largest logit, or of 1 where all are smaller."""


def describe(task: Task, recipe: Recipe, backbone: LoadedBackbone, classes: Sequence[str]) -> PackMetadata:
    """What a pack says of itself. Everything in it is known before training."""
    return PackMetadata(
        task=task.name,
        classes=list(classes),
        metric=task.metric,
        input=PackInput(size_px=backbone.size_px, mean=backbone.mean, std=backbone.std, interpolation="bicubic"),
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        backbone=PackBackbone(model=task.backbone.model, arguments=dict(task.backbone.arguments), fingerprint=backbone.fingerprint),
        selection=task.selection.model_dump() if recipe.connections else {},
        seed=task.seed,
    )


def planned_ledger(task: Task, recipe: Recipe, backbone: LoadedBackbone, classes: Sequence[str]) -> dict[str, int]:
    """Bytes by part of the pack this recipe will give, to the byte, before anything is trained."""
    probe = np.zeros((PROBE_IMAGES, len(classes)), np.float32)
    return ledger(Pack(describe(task, recipe, backbone, classes), _zero_parts(recipe, backbone, len(classes)), probe))


def planned_size_bytes(task: Task, recipe: Recipe, backbone: LoadedBackbone, classes: Sequence[str]) -> int:
    """Size of that pack: what the ledger adds up to."""
    return predict_size_bytes(describe(task, recipe, backbone, classes), _zero_parts(recipe, backbone, len(classes)), PROBE_IMAGES)


def _zero_parts(recipe: Recipe, backbone: LoadedBackbone, class_count: int) -> tuple[Part, ...]:
    return tuple(zero_part(*_specs(group)) for group in _groups(plan(backbone, recipe, class_count)))


def to_pack(model: AdaptedModel, metadata: PackMetadata) -> Pack:
    """Encode every trained tensor, and the logits of the probe images to check a reload by."""
    codes, positions = model.values.encode(), model.positions()
    parts = [_part(group, codes, positions) for group in _groups(model.values.tensors)]
    return Pack(metadata, tuple(parts), probe_logits(model, metadata.input.size_px))


def from_pack(pack: Pack, backbone: LoadedBackbone) -> AdaptedModel:
    """Rebuild the model a pack describes on its backbone.

    Raises:
        PackBackboneMismatch: the backbone's tensors are not those the pack was trained on.
        PackDamaged: the pack's parts are not those its recipe plans, or its probe logits are not reproduced.
    """
    meta = pack.metadata
    if meta.backbone["fingerprint"] != backbone.fingerprint:
        raise PackBackboneMismatch(
            f"this pack of task {meta.task!r} needs the backbone {meta.backbone['model']} with fingerprint {meta.backbone['fingerprint'][:16]}..., "
            f"given one with {backbone.fingerprint[:16]}...; give the checkpoint it was trained on"
        )
    if meta.input.size_px != backbone.size_px:
        raise PackBackboneMismatch(f"the pack of task {meta.task!r} takes {meta.input.size_px} px images, given a backbone set to {backbone.size_px}")
    recipe = _recipe(pack)
    stored = {(part.name, spec.name): (part, spec) for part in pack.parts for spec in part.tensors}
    planned = plan(backbone, recipe, len(meta.classes))
    columns = {(part.name, spec.name): count for part in pack.parts for spec, count in zip(part.tensors, part.columns, strict=False)}
    _compare(planned, {key: (spec, part.bits, columns.get(key)) for key, (part, spec) in stored.items()})
    selected = {
        spec.name: torch.from_numpy(index) for part in pack.parts if part.positions for spec, index in zip(part.tensors, part.positions, strict=True)
    }
    model = attach(backbone, recipe, len(meta.classes), selected=selected)
    values = {(part.name, name): array for part in pack.parts for name, array in part.values().items()}
    model.values.load_stored({tensor: torch.from_numpy(values[tensor.part, tensor.name]) for tensor in planned})
    _check_probe(model, pack)
    return model


@torch.inference_mode()
def probe_logits(model: AdaptedModel, size_px: int) -> np.ndarray:
    """Logits [P, C] of fixed pseudo-random images: what a reloaded pack must reproduce."""
    images = np.random.default_rng(0).integers(0, 256, (PROBE_IMAGES, 3, size_px, size_px), dtype=np.uint8)
    return model.eval()(torch.from_numpy(images)).float().numpy()


def _groups(tensors: Sequence[PlannedTensor]) -> list[list[PlannedTensor]]:
    """Neighbours of one part and one width share a part of the file."""
    return [list(group) for _, group in itertools.groupby(tensors, key=lambda tensor: (tensor.part, tensor.bits))]


def _specs(group: list[PlannedTensor]) -> tuple[PartName, PartBits, tuple[TensorSpec, ...], tuple[int, ...]]:
    specs = tuple(_spec(tensor) for tensor in group)
    columns = tuple(tensor.layer[1] for tensor in group if tensor.layer is not None)
    return group[0].part, group[0].bits, specs, columns


def _spec(tensor: PlannedTensor) -> TensorSpec:
    """A tensor as the file has it: connections as [O, K], as many for each neuron."""
    shape = tensor.shape if tensor.layer is None else (tensor.layer[0], tensor.values // tensor.layer[0])
    return TensorSpec(tensor.name, shape)


def _part(
    group: list[PlannedTensor], encoded: Mapping[PlannedTensor, tuple[np.ndarray, np.ndarray | None]], positions: Mapping[str, torch.Tensor]
) -> Part:
    name, bits, specs, columns = _specs(group)
    scales = [scale for tensor in group for scale in [encoded[tensor][1]] if scale is not None]
    return Part(
        name=name,
        bits=bits,
        tensors=specs,
        codes=np.concatenate([encoded[tensor][0] for tensor in group]),
        scales=np.concatenate(scales) if scales else None,
        positions=tuple(
            (positions[spec.name].view(spec.shape) % inputs).cpu().numpy().astype(np.int32) for spec, inputs in zip(specs, columns, strict=True)
        )
        if columns
        else (),
        columns=columns,
    )


def _recipe(pack: Pack) -> Recipe:
    try:
        return Recipe.model_validate(pack.metadata.recipe)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise PackDamaged(f"the pack's recipe is not valid: {'.'.join(str(key) for key in fault['loc'])}: {fault['msg']}") from None


def _compare(planned: Sequence[PlannedTensor], stored: dict[tuple[str, str], tuple[TensorSpec, int, int | None]]) -> None:
    wanted = {(tensor.part, tensor.name): (_spec(tensor), int(tensor.bits), tensor.layer[1] if tensor.layer else None) for tensor in planned}
    if wanted == stored:
        return
    missing, surplus = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    changed = [key for key in sorted(wanted.keys() & stored.keys()) if wanted[key] != stored[key]]
    kind, (part, name) = next((kind, keys[0]) for kind, keys in (("missing", missing), ("surplus", surplus), ("ill-shaped", changed)) if keys)
    raise PackDamaged(f"the pack's parts are not those of its recipe: {kind} {part} {name!r}; it was written by other code or changed afterwards")


def _check_probe(model: AdaptedModel, pack: Pack) -> None:
    now = probe_logits(model, pack.metadata.input.size_px)
    worst = float(np.abs(now - pack.probe_logits).max())
    if not worst <= PROBE_TOLERANCE * max(1.0, float(np.abs(pack.probe_logits).max())):  # not a number is refused, too
        raise PackDamaged(
            f"the reloaded model's probe logits differ by {worst:.3g} from those stored; this build computes something else than the writer"
        )
