"""Evaluation: every sample once, in float32, without autograd.

The final test is exact: a GPU computes what a CPU does, up to the order of sums. Validation may
round the inputs of products to TF32 (10 bits, as many as half precision has) on GPUs that have
units for it, where that takes a fraction of the time. Weights, sums and everything else stay
float32.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from pipeline.adaptation import AdaptedModel
from pipeline.data import Reader, Split, deal_shards, evaluation_batches
from pipeline.kinds import Outcomes, TaskKind
from pipeline.training.passes import Passes
from pipeline.training.ranks import ALONE, Ranks
from pipeline.utils.devices import exact_float32, fast_float32, is_accelerator

EVALUATION_BATCH = 128
"""Samples per pass on a CPU."""
_BATCH_OF_ACCELERATOR = 512


def batch_size(device: str | torch.device) -> int:
    """Samples per pass on a device."""
    return _BATCH_OF_ACCELERATOR if is_accelerator(device) else EVALUATION_BATCH


def _logits(model: AdaptedModel, images: torch.Tensor, size: int) -> torch.Tensor:
    """The logits of images, on the CPU, `size` at a time."""
    return torch.cat([model.logits_of(model.inputs_of(some)).cpu() for some in images.split(size)])


@torch.inference_mode()
def evaluate(
    model: AdaptedModel,
    reader: Reader,
    split: Split,
    kind: TaskKind,
    *,
    ranks: Ranks = ALONE,
    is_exact: bool = True,
) -> Outcomes:
    """The model's outputs for every sample of `split`, in its order, on all ranks.

    Each rank computes the samples of its shards. Unless it `is_exact`, a GPU may round the inputs
    of products to TF32.
    """
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    size = batch_size(model.device)
    with model.merged(), exact_float32() if is_exact else fast_float32():
        plan = evaluation_batches(split, size, ranks.rank, ranks.world)
        passes = Passes(size, str(model.device))
        for images, targets in reader.batches(plan):
            logits = passes.fit(functools.partial(_logits, model, images), len(images))
            kept = kind.kept(logits, targets)
            rows.append((kept[0].numpy(), kept[1].numpy()))
    return in_order(rows, split, ranks)


def in_order(
    rows: list[tuple[np.ndarray, np.ndarray]], split: Split, ranks: Ranks = ALONE
) -> Outcomes:
    """Collect the outputs and targets that each rank computed for its shards, in the split's
    order.
    """
    outputs, targets_N = (np.concatenate(each) for each in zip(*ranks.rows(rows), strict=True))
    rank_of_sample = deal_shards(split, ranks.world)[split.samples[:, 0]]
    index_N = np.argsort(np.argsort(rank_of_sample, kind="stable"), kind="stable")
    return Outcomes(outputs[index_N], targets_N[index_N])
