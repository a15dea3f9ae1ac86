"""Evaluation of dense outputs in the sizes of the stored masks, rather than that of the input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from pipeline.adaptation import AdaptedModel
from pipeline.data import Modality, Reader, Split, evaluation_batches, rgb_image
from pipeline.data.stored import stored_samples
from pipeline.kinds import Outcomes, TaskKind
from pipeline.training.evaluate import evaluate, in_order
from pipeline.training.ranks import ALONE, Ranks
from pipeline.utils.devices import exact_float32


def final_outcomes(
    model: AdaptedModel, reader: Reader, split: Split, kind: TaskKind, *, ranks: Ranks = ALONE
) -> Outcomes:
    """What a pack is tested by, on all ranks: its outputs for every sample of `split`, in its
    order; of a dense kind at the sizes of the stored masks.
    """
    if kind.is_dense:
        return evaluate_at_full_size(model, reader, split, kind, ranks=ranks)
    return evaluate(model, reader, split, kind, ranks=ranks)


@exact_float32()
@torch.inference_mode()
def evaluate_at_full_size(
    model: AdaptedModel, reader: Reader, split: Split, kind: TaskKind, *, ranks: Ranks = ALONE
) -> Outcomes:
    """The outputs of a dense kind for every sample of `split`, in its order, on all ranks: logits
    are interpolated to the size of the stored mask. Each rank computes the samples of its shards.
    """
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    batches = evaluation_batches(split, len(split.samples), ranks.rank, ranks.world)
    with model.merged():
        for samples in batches:
            own = replace(split, samples=samples)
            for _, mask, logits in _outputs(model, reader.index_folder, own, reader.takes):
                kept = kind.kept(logits, torch.from_numpy(mask)[None])
                rows.append((kept[0].numpy(), kept[1].numpy()))
    return in_order(rows, split, ranks)


@exact_float32()
@torch.inference_mode()
def predicted_masks(
    model: AdaptedModel, index_folder: Path, split: Split, takes: Modality
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Each sample's image, uint8 [H, W, 3], its mask and its predicted mask, uint8 [H, W]."""
    with model.merged():
        return [
            (
                np.asarray(rgb_image(image)),
                mask,
                logits[0].argmax(dim=0).numpy().astype(np.uint8),
            )
            for image, mask, logits in _outputs(model, index_folder, split, takes)
        ]


def _outputs(
    model: AdaptedModel, index_folder: Path, split: Split, takes: Modality
) -> Iterator[tuple[bytes, np.ndarray, torch.Tensor]]:
    """Each sample's encoded image, its mask [H, W], and its logits [1, C, H, W] on the CPU."""
    for image, mask in stored_samples(index_folder, split):
        pixels = torch.from_numpy(takes.decode(image))[None]
        # Contiguous, so that they are rounded as those of `predict`, which come class by class.
        logits = model.logits_of(model.inputs_of(pixels)).float().contiguous()
        whole = functional.interpolate(logits, mask.shape, mode="bilinear", align_corners=False)
        yield image, mask, whole.cpu()
