"""Convert an adapted model to a pack and back."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from pipeline.adaptation.attach import AdaptedModel, attach
from pipeline.adaptation.recipe_plan import PlannedTensor, plan
from pipeline.adaptation.selected.ranking import (
    SelectedIndex,
    first_indices,
    kept_indices,
    rank_indices,
)
from pipeline.adaptation.selected.recomputed import is_recomputable, recompute
from pipeline.adaptation.sites import weight_shapes
from pipeline.adaptation.unpacking import decode
from pipeline.backbones import LoadedBackbone
from pipeline.errors import PackDamaged
from pipeline.packs import (
    Calibration,
    Pack,
    PackBackbone,
    PackMetadata,
    Part,
    PartBits,
    PartName,
    TensorSpec,
    largest_size_bytes,
    ledger,
    read_input,
    zero_part,
)
from pipeline.specs import Recipe, Selection, Task, Training
from pipeline.utils.byte_cache import ByteCache

PROBES = 2
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
        modality=backbone.takes.name,
        input=read_input(backbone.takes.facts()),
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


CodePositions = Callable[[Part], bytes]
_KEPT_POSITIONS: ByteCache[str, bytes] = ByteCache()
_KEPT_BYTES = 32 << 20


def positions_digest(part: Part) -> str:
    """Equal for parts whose positions take the same bytes."""
    digest = hashlib.sha256(repr(part.layer_shapes).encode())
    for index_N in part.positions:
        digest.update(index_N.tobytes())
    return digest.hexdigest()


def code_positions(part: Part) -> bytes:
    """The positions of a part as a pack stores them. This process keeps them for other recipes and
    tasks, because coding those of a ViT-B takes seconds.
    """
    key = positions_digest(part)
    coded = _KEPT_POSITIONS.get(key)
    if coded is None:
        coded = part.encoded_positions
        _KEPT_POSITIONS.put(key, coded, len(coded))
        _KEPT_POSITIONS.trim(_KEPT_BYTES)
    return coded


class SizePlanner:
    """Predicts the pack sizes of recipes before anything is trained.

    Sizes are exact if the task's selection is known or positions are not stored. Otherwise the
    cheapest positions are assumed, and the size is a lower bound.

    Args:
        code: codes the positions of a part, once for each number of connections.
    """

    def __init__(
        self,
        task: Task,
        backbone: LoadedBackbone,
        classes: Sequence[str],
        selected: SelectedIndex | None = None,
        code: CodePositions = code_positions,
    ) -> None:
        self._code = code
        self._task, self._backbone, self._classes, self._selected = (
            task,
            backbone,
            classes,
            selected,
        )
        self._connections: dict[str, tuple[SelectedIndex, Part]] = {}
        self._parts: dict[tuple[PlannedTensor, ...], Part] = {}
        self._coded: dict[tuple[int, str], bytes] = {}

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
            connections if connections and group[0].part == "connections" else self._zeros(group)
            for group in groups
        ]
        probe = np.zeros((PROBES, len(self._classes)), np.float32)
        metadata = describe(self._task, recipe, self._backbone, self._classes)
        coverage = self._task.coverage
        calibration = None if coverage is None else Calibration(coverage)
        return ledger(Pack(metadata, tuple(parts), probe, calibration))

    def _zeros(self, group: list[PlannedTensor]) -> Part:
        """A part as large as the trained one, cached, because recipes share parts."""
        key = tuple(group)
        if key not in self._parts:
            self._parts[key] = _zeros(group)
        return self._parts[key]

    def _planned_connections(self, recipe: Recipe) -> tuple[SelectedIndex, Part]:
        """The selection and the part, cached, because coding positions takes longest."""
        assert recipe.connections is not None
        where = repr((recipe.from_block or 0, recipe.decoder is None))
        key = repr((recipe.connections, recipe.quantiser, where))
        if key not in self._connections:
            top_k, is_stored = recipe.connections.top_k, not is_recomputable(self._task.selection)
            selected = self._selected or self._assumed(top_k)
            alone = Recipe(
                connections=recipe.connections,
                quantiser=recipe.quantiser,
                from_block=recipe.from_block,
                decoder=recipe.decoder,
            )
            group, indices = (
                _groups(plan(self._backbone, alone, 1, selected))[0],
                kept_indices(selected, top_k),
            )
            positions = (
                tuple(_as_indices(indices[tensor.name]) for tensor in group) if is_stored else ()
            )
            part = _zeros(group, positions, recomputed=not is_stored)
            if (top_k, where) not in self._coded:  # whatever the values' bits
                self._coded[top_k, where] = self._code(part)
            vars(part)["encoded_positions"] = self._coded[top_k, where]
            self._connections[key] = selected, part
        return self._connections[key]

    def _assumed(self, top_k: int) -> SelectedIndex:
        spec = self._task.selection
        if is_recomputable(spec):
            return recompute(self._backbone, spec, top_k)
        if spec.level == "neuron":
            return first_indices(weight_shapes(self._backbone.model), top_k)
        return rank_indices(self._equal_importance(), spec.level, top_k)

    def _equal_importance(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(shape) for name, shape in weight_shapes(self._backbone.model).items()
        }


def to_pack(model: AdaptedModel, metadata: PackMetadata) -> Pack:
    """Encode every trained tensor, and the logits of the probe samples to check a reload by."""
    codes, positions = model.values.encode(), model.positions()
    recomputed = bool(metadata.selection) and is_recomputable(
        Selection.model_validate(metadata.selection)
    )
    parts = [_part(group, codes, positions, recomputed) for group in _groups(model.values.tensors)]
    return Pack(metadata, tuple(parts), probe_logits(model))


def from_pack(pack: Pack, backbone: LoadedBackbone) -> AdaptedModel:
    """Rebuild the model a pack describes on its backbone.

    Raises:
        PackBackboneMismatch: the backbone's tensors are not those the pack was trained on.
        PackDamaged: the pack's parts are not those its recipe plans, or its probe logits are not
            reproduced.
    """
    decoded = decode(pack, backbone)
    model = attach(
        backbone,
        decoded.recipe.model_copy(update={"training": Training()}),
        len(pack.metadata.classes),
        selected=decoded.selected,
    )
    model.values.load_stored(decoded.values)
    check_probe(probe_logits(model), pack)
    return model


@torch.inference_mode()
def probe_logits(model: AdaptedModel) -> np.ndarray:
    """Logits [P, C] of the probe samples, their means over all pixels where each has its own: what
    a reloaded pack must reproduce.
    """
    logits = model.eval()(torch.from_numpy(model.takes.probe(PROBES))).float()
    return (logits if logits.ndim == 2 else logits.mean(dim=(2, 3))).numpy()


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


def check_probe(now: np.ndarray, pack: Pack) -> None:
    """Compare logits [P, C] of the first probe samples, as computed here, with a pack's own. Raises
    PackDamaged.
    """
    worst = float(np.abs(now - pack.probe_logits[: len(now)]).max())
    if not worst <= PROBE_TOLERANCE * max(
        1.0, float(np.abs(pack.probe_logits).max())
    ):  # not a number is refused, too
        raise PackDamaged(
            f"the reloaded model's probe logits differ by {worst:.3g} from those stored; this build"
            " computes something else than the writer"
        )
