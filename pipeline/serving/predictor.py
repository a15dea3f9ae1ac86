"""Predictions from one pack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.adaptation import AdaptedModel
from pipeline.adaptation.packing import from_pack
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.backbones.known import recall
from pipeline.data import decode_image
from pipeline.errors import BackboneError, DataError, PackError
from pipeline.kinds import TaskKind, kind_named
from pipeline.packs import Pack, PackMetadata, read_pack
from pipeline.specs import Backbone, Input
from pipeline.specs.catalogue import catalogue_folder
from pipeline.specs.yaml_files import load_spec
from pipeline.utils.devices import choose_device, exact_float32

PREDICT_BATCH = 64
"""Images decoded and classified at a time: enough to fill a GPU, and few enough for any memory."""
ImageSource = Path | str | bytes | Image.Image | np.ndarray


class Predictor:
    """A pack on its backbone, ready to predict images on `device`; None takes the GPU, where there
    is one.
    """

    def __init__(self, pack: Pack, backbone: LoadedBackbone, device: str | None = None) -> None:
        self.metadata: PackMetadata = pack.metadata
        self.kind = kind_of(pack.metadata)
        self.backbone = backbone
        self.device = choose_device(device)
        self.model: AdaptedModel = from_pack(pack, backbone).to(self.device)
        self.model.merge()

    def logits(self, images: Sequence[ImageSource]) -> torch.Tensor:
        """Logits [N, C] of images given as paths, encoded bytes, PIL images or uint8 arrays [H, W,
        3]. Raises DataError.
        """
        numbered = list(enumerate(images))
        logits = [
            self._logits(numbered[start : start + PREDICT_BATCH])
            for start in range(0, len(numbered), PREDICT_BATCH)
        ]
        return torch.cat(logits) if logits else torch.zeros(0, len(self.metadata.classes))

    @exact_float32()
    @torch.inference_mode()
    def _logits(self, batch: Sequence[tuple[int, ImageSource]]) -> torch.Tensor:
        """Logits [B, C], on the CPU, of one batch."""
        decoded = [_decode(image, number, self.metadata.input.size_px) for number, image in batch]
        return self.model(torch.from_numpy(np.stack(decoded)).to(self.device)).cpu()

    def predict(self, images: Sequence[ImageSource]) -> list[dict[str, Any]]:
        """What the pack says of each image, by its kind. Raises DataError for what is not an image.

        Returns:
            classification: the most probable class, `label` and `probability` (0 to 1). multilabel:
                `labels`, the classes whose probability is above 0.5, and `probabilities` of all
                classes by name.
        """
        return self.kind.predictions(self.logits(images), self.metadata.classes)


def kind_of(metadata: PackMetadata) -> TaskKind:
    """The kind of a pack's task. Raises PackError for one that this version does not know."""
    try:
        return kind_named(metadata.kind)
    except ValueError:
        raise PackError(
            f"the pack of task {metadata.task!r} is of kind {metadata.kind!r}, which this taskpack"
            " does not know; upgrade taskpack"
        ) from None


def _decode(image: ImageSource, number: int, size_px: int) -> np.ndarray:
    """The image as uint8 [3, size_px, size_px]; errors call one without a path by its number."""
    if isinstance(image, np.ndarray):
        try:
            picture = Image.fromarray(image)
        except (TypeError, ValueError):
            raise DataError(
                f"image {number}: given an array of {image.dtype} {list(image.shape)}; expected"
                " uint8 [H, W, 3]"
            ) from None
        return decode_image(picture, size_px, f"image {number}")
    return decode_image(image, size_px, "" if isinstance(image, (Path, str)) else f"image {number}")


def load_predictor(
    pack_path: Path, weights: str | None = None, device: str | None = None
) -> Predictor:
    """Open a pack on its backbone.

    Args:
        weights: the backbone's checkpoint; default: the one this machine used for that fingerprint,
            or the embedded one.
        device: where to compute, such as `cpu` or `cuda:1`; default: the GPU, where there is one.

    Raises:
        SpecError: there is no such device.
        PackError: the file is not a sound pack, or the backbone is another.
        BackboneError: no backbone was given and none with the pack's fingerprint is known here.
    """
    pack = read_pack(pack_path)
    return Predictor(pack, load_backbone_of(pack.metadata, weights), device)


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
    return load_backbone(
        spec,
        Input(size_px=metadata.input.size_px, mean=metadata.input.mean, std=metadata.input.std),
    )


def _embedded(metadata: PackMetadata) -> str | None:
    path = catalogue_folder() / "demo" / "backbone.yaml"
    if not path.is_file():
        return None
    spec = load_spec(Backbone, path)
    same = (spec.model, spec.arguments) == (
        metadata.backbone["model"],
        metadata.backbone["arguments"],
    )
    return str(path.parent / spec.weights) if same else None
