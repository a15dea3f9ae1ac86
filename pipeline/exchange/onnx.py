"""A pack's whole model as one ONNX file, whatever its recipe: uint8 images in, logits out, any
number of images at a time.

    images   uint8 [batch, 3, S, S]    RGB, resized to a square of S pixels (bicubic, antialiased);
                                       scaling and normalisation are in the file
    logits   float32 [batch, C]        classes by number; their names are in the file's metadata.
                                       Of segmentation [batch, C, S, S]

Trained values are merged into the layers first, so the graph has no trace of training. The file is
checked against the model with onnxruntime before it gets its name.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer_sam import Attention

from pipeline.adaptation import AdaptedModel
from pipeline.adaptation.packing import from_pack
from pipeline.adaptation.working import fuse_attention
from pipeline.backbones import LoadedBackbone
from pipeline.errors import ExportError
from pipeline.exchange.merged_checkpoint import check_logits
from pipeline.packs import Pack
from pipeline.utils.files import whole

EXAMPLES = 2  # a batch of 1 would be taken for a constant


def export_onnx(pack: Pack, backbone: LoadedBackbone, path: Path) -> float:
    """Write the file, atomically; returns the largest difference of a probe logit under
    onnxruntime.

    Raises:
        ExportError: a package of the extra `export` is missing, the model cannot be expressed, or
            onnxruntime computes something else.
        StorageError: the file exists or cannot be written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ExportError(
            f"exporting to onnx needs the package {error.name}; pip install 'taskpack[export]'"
        ) from None
    model = from_pack(pack, backbone)
    model.merge()
    facts = {
        "task": pack.metadata.task,
        "classes": json.dumps(pack.metadata.classes),
        "backbone": pack.metadata.backbone["model"],
    }
    with whole(path) as scratch:
        _write(model, facts, scratch)
        session = onnxruntime.InferenceSession(str(scratch), providers=["CPUExecutionProvider"])
        # One image at a time and all at once: both must work.
        one_by_one = check_logits(
            model,
            lambda images: torch.cat([_run(session, image) for image in images.split(1)]),
        )
        return max(one_by_one, check_logits(model, lambda images: _run(session, images)))


def _run(session: Any, images: torch.Tensor) -> torch.Tensor:
    try:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    except Exception as error:  # onnxruntime's own errors have no common class
        raise ExportError(
            f"onnxruntime cannot run the exported model on {len(images)} images: {error}"
        ) from None


def _write(model: AdaptedModel, facts: dict[str, str], path: Path) -> None:
    images = torch.zeros(EXAMPLES, *model.takes.shape, dtype=torch.uint8)
    with torch.no_grad(), _quiet(), _attention_in_parts(model):
        try:
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(
                f"torch cannot express this model in ONNX: {_reason(error)}"
            ) from None
        assert program is not None
        program.model.metadata_props.update(facts)
        program.save(path, external_data=False)


@contextlib.contextmanager
def _attention_in_parts(model: AdaptedModel) -> Iterator[None]:
    """Compute the attention of SAM's encoder without torch's kernel, whose form on tensors of three
    dimensions ONNX does not have.
    """
    modules = [module for module in model.modules() if isinstance(module, Attention)]
    fuse_attention(modules, False)
    try:
        yield
    finally:
        fuse_attention(modules, True)


def _reason(error: BaseException) -> str:
    """The message of the first error in a chain, as one line without colours; later ones explain
    how to debug torch.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress messages."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
