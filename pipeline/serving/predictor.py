"""Predictions from one pack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.adaptation import AdaptedModel
from pipeline.adaptation.packing import from_pack
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.backbones.known import recall
from pipeline.errors import BackboneError, PackError
from pipeline.kinds import TaskKind, kind_named
from pipeline.packs import Pack, PackMetadata, read_pack
from pipeline.serving.answers import SET_COLUMN, answers
from pipeline.serving.masks import dense_logits, mask_answer
from pipeline.serving.samples import Sample, decoded
from pipeline.specs import Backbone, Input
from pipeline.specs.catalogue import catalogue_folder
from pipeline.specs.yaml_files import load_spec
from pipeline.utils.devices import choose_device, computing_dtype, exact_float32
from pipeline.utils.precision import Precision

PREDICT_BATCH = 64
"""Images decoded and classified at a time: enough to fill a GPU, and few enough for any memory."""


class Predictor:
    """A pack on its backbone, ready to predict images on `device`; None takes the GPU, where there
    is one. `precision` is that of products; `bf16` becomes float32 on devices without units for it.
    It is not thread-safe.
    """

    def __init__(
        self,
        pack: Pack,
        backbone: LoadedBackbone,
        device: str | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self.metadata: PackMetadata = pack.metadata
        self.kind, self.calibration = kind_of(pack.metadata), pack.calibration
        self.backbone = backbone
        self.device = choose_device(device)
        self.model: AdaptedModel = from_pack(pack, backbone).to(self.device)
        self.model.merge(computing_dtype(precision, self.device))

    @property
    def columns(self) -> tuple[tuple[str, Any], ...]:
        """The keys of a prediction, each with the type of its value."""
        return self.kind.columns + (() if self.calibration is None else (SET_COLUMN,))

    def logits(self, images: Sequence[Sample]) -> torch.Tensor:
        """Logits [N, C], of a dense kind [N, C, S, S], of images given as paths, encoded bytes, PIL
        images or uint8 arrays [H, W, 3]; of point clouds given as paths, a file's bytes or arrays
        [N, 3 or 6]. Raises DataError.
        """
        if not images:
            return torch.zeros(0, len(self.metadata.classes))
        takes = self.backbone.takes
        if self.kind.is_dense:
            samples = (decoded(image, number, takes) for number, image in enumerate(images))
            return torch.stack([dense_logits(self.model, sample) for sample in samples])
        starts = range(0, len(images), PREDICT_BATCH)
        return torch.cat([self._logits(images, start) for start in starts])

    @exact_float32()
    @torch.inference_mode()
    def _logits(self, images: Sequence[Sample], start: int) -> torch.Tensor:
        """Logits [B, C], on the CPU, of the batch that begins with image `start`."""
        batch = enumerate(images[start : start + PREDICT_BATCH], start)
        arrays = [decoded(image, number, self.backbone.takes).array for number, image in batch]
        return self.model(torch.from_numpy(np.stack(arrays)).to(self.device)).cpu()

    def predict(self, images: Sequence[Sample]) -> list[dict[str, Any]]:
        """What the pack says of each image, by its kind. Raises DataError for what is not an image.

        Returns:
            classification: the most probable class, `label` and `probability` (0 to 1), and of a
                pack with a coverage `set`, the classes that are probable enough. multilabel:
                `labels`, the classes whose probability is above 0.5, and `probabilities` of all
                classes by name. segmentation: `areas`, the fraction of pixels of each class, and
                `mask`, a PNG of class numbers in the image's own size.
        """
        classes = self.metadata.classes
        if not self.kind.is_dense:
            logits = self.logits(images)
            return answers(self.kind, classes, self.calibration, logits)
        rows = []
        for number, image in enumerate(images):
            sample = decoded(image, number, self.backbone.takes)
            rows.append(mask_answer(self.kind, classes, dense_logits(self.model, sample), sample))
        return rows


def kind_of(metadata: PackMetadata) -> TaskKind:
    """The kind of a pack's task. Raises PackError for one that this version does not know."""
    try:
        return kind_named(metadata.kind)
    except ValueError:
        raise PackError(
            f"the pack of task {metadata.task!r} is of kind {metadata.kind!r}, which this taskpack"
            " does not know; upgrade taskpack"
        ) from None


def load_predictor(
    pack_path: Path,
    weights: str | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
) -> Predictor:
    """Open a pack on its backbone.

    Args:
        weights: the backbone's checkpoint; default: the one this machine used for that fingerprint,
            or the embedded one.
        device: where to compute, such as `cpu` or `cuda:1`; default: the GPU, where there is one.
        precision: as of `Predictor`.

    Raises:
        SpecError: there is no such device.
        PackError: the file is not a sound pack, or the backbone is another.
        BackboneError: no backbone was given and none with the pack's fingerprint is known here.
    """
    pack = read_pack(pack_path)
    return Predictor(pack, load_backbone_of(pack.metadata, weights), device, precision)


def load_backbone_of(metadata: PackMetadata, weights: str | None = None) -> LoadedBackbone:
    """The backbone a pack belongs to; see `load_predictor`."""
    fingerprint = metadata.backbone["fingerprint"]
    weights = weights or recall(fingerprint) or _embedded(metadata)
    if weights is None:
        raise BackboneError(
            f"the pack of task {metadata.task!r} needs the backbone {metadata.backbone['model']}"
            f" with fingerprint {fingerprint[:16]}..., which is not known on this machine; give its"
            " checkpoint (--backbone FILE, or TASKPACK_BACKBONE=FILE)"
        )
    spec = Backbone(
        model=metadata.backbone["model"], arguments=metadata.backbone["arguments"], weights=weights
    )  # type: ignore[arg-type]
    return load_backbone(spec, input_of(metadata), gives_maps=kind_of(metadata).is_dense)


def input_of(metadata: PackMetadata) -> Input:
    """The input that a pack's task gives its backbone."""
    return Input.model_validate(
        {key: value for key, value in metadata.input if key in Input.model_fields}
    )


def _embedded(metadata: PackMetadata) -> str | None:
    """A checkpoint of the pack's network among those that come with taskpack."""
    for path in sorted(catalogue_folder().glob("*/backbone.yaml")):
        spec = load_spec(Backbone, path)
        checkpoint = path.parent / spec.weights
        same = (spec.model, spec.arguments) == (
            metadata.backbone["model"],
            metadata.backbone["arguments"],
        )
        if same and checkpoint.is_file():
            return str(checkpoint)
    return None
