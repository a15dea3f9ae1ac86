"""A pack as a plain timm checkpoint: the backbone with everything trained written into its weights,
and the head as timm's classifier.

The folder is what timm calls a local directory: `model.safetensors` with timm's tensor names, and
`config.json` with architecture, arguments, preprocessing and class names.
`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it without this package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.adaptation import AdaptedModel
from pipeline.adaptation.merged import merged_state
from pipeline.adaptation.packing import PROBES, from_pack
from pipeline.adaptation.part import PARTS
from pipeline.backbones import LoadedBackbone
from pipeline.errors import ExportError
from pipeline.packs import Pack, PackMetadata
from pipeline.utils.files import whole

TOLERANCE = 1e-3
"""Tolerance between the logits of a pack and of its export, as a fraction of the largest logit, or
of 1 if all are smaller.
"""


def export_checkpoint(pack: Pack, backbone: LoadedBackbone, folder: Path) -> float:
    """Write the folder, atomically; returns the largest difference of a probe logit.

    Raises:
        ExportError: the pack has a part that no weight can hold, or timm's model computes something
            else.
        StorageError: the folder exists or cannot be written.
    """
    refused = [
        part for part in PARTS.values() if part.no_weight and part.name in pack.metadata.recipe
    ]
    if refused:
        raise ExportError(
            f"a timm checkpoint cannot hold the part {refused[0].name} of this pack, because"
            f" {refused[0].no_weight}; export to onnx, which holds the whole model"
        )
    model = from_pack(pack, backbone)
    plain = plain_network(pack.metadata, backbone)
    state = {**merged_state(model, backbone.model), **head_state(model, plain)}
    _load(plain, state)
    difference = check_logits(model, lambda images: plain(model.normalise(images)))
    config = _config(pack.metadata, plain, model_arguments(pack.metadata, backbone))
    with whole(folder) as scratch:
        scratch.mkdir()
        save_file(state, scratch / "model.safetensors", metadata={"format": "pt"})
        (scratch / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return difference


def plain_network(metadata: PackMetadata, backbone: LoadedBackbone) -> nn.Module:
    """Timm's own model for a pack: at its input size, with a classifier for its classes. Raises
    ExportError where timm cannot make one.
    """
    if backbone.gives_maps:
        raise ExportError(
            "timm's models have a head for classes, not for masks; export to onnx, which holds the"
            " whole model"
        )
    try:
        return timm.create_model(
            metadata.backbone["model"],
            num_classes=len(metadata.classes),
            **model_arguments(metadata, backbone),
        ).eval()
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ExportError(
            f"timm makes no {metadata.backbone['model']} of {metadata.images.size_px} px with a"
            f" classifier ({error}); export to onnx instead"
        ) from None


def model_arguments(metadata: PackMetadata, backbone: LoadedBackbone) -> dict[str, Any]:
    """Arguments of `timm.create_model` other than the name and number of classes."""
    size = (
        {"img_size": metadata.images.size_px} if hasattr(backbone.model, "set_input_size") else {}
    )
    return {**metadata.backbone["arguments"], **size}


def head_state(model: AdaptedModel, plain: nn.Module) -> dict[str, torch.Tensor]:
    """The head's tensors under the names that timm's classifier has; a head without bias has one of
    zeros, and one of a subspace is written for the whole feature. Raises ExportError.
    """
    config: Any = plain.pretrained_cfg
    name, expected = config.get("classifier"), plain.state_dict()
    if not isinstance(name, str) or f"{name}.bias" not in expected:
        raise ExportError(
            f"{type(plain).__name__} has no single linear classifier (timm names {name}); export to"
            " onnx instead"
        )
    with model.merged():
        tensors = model.head.plain_tensors()
    weight, bias = tensors["weight"].detach(), tensors.get("bias")
    weight = weight.view(expected[f"{name}.weight"].shape).contiguous()
    return {
        f"{name}.weight": weight,
        f"{name}.bias": torch.zeros(len(weight)) if bias is None else bias.detach().contiguous(),
    }


def check_logits(model: AdaptedModel, exported: Any) -> float:
    """The largest difference between the logits of a model and of its export, on probe images.
    Raises ExportError beyond TOLERANCE.
    """
    images = torch.from_numpy(model.takes.probe(PROBES))
    with torch.inference_mode():
        expected = model.eval()(images)
        difference = float((torch.as_tensor(exported(images)) - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:  # not a number is refused, too
        raise ExportError(
            f"the exported model's logits differ from the pack's by {difference:.3g}; at most"
            f" {allowed:.3g} may come from rounding"
        )
    return difference


def _load(plain: nn.Module, state: dict[str, torch.Tensor]) -> None:
    try:
        plain.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(
            f"timm's {type(plain).__name__} has other tensors than this pack's network"
            f" ({str(error)[:300]}); export to onnx"
        ) from None


def _config(metadata: PackMetadata, plain: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    config: Any = plain.pretrained_cfg
    size_px, classes = metadata.images.size_px, len(metadata.classes)
    preprocessing = {
        "input_size": [3, size_px, size_px],
        "interpolation": metadata.images.interpolation,
        "mean": list(metadata.images.mean),
        "std": list(metadata.images.std),
        "crop_pct": 1.0,
        "crop_mode": "squash",  # to a square, whatever the aspect
    }
    return {
        "architecture": config["architecture"],
        "num_classes": classes,
        "num_features": plain.num_features,
        "label_names": metadata.classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": classes,
            **preprocessing,
            "first_conv": config.get("first_conv"),
            "classifier": config["classifier"],
        },
    }
