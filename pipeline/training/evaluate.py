"""Exact evaluation: every sample once, in float32, without autograd."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.adaptation import AdaptedModel
from pipeline.data import Reader, Split, deal_shards, evaluation_batches
from pipeline.kinds import Outcomes, TaskKind
from pipeline.training.ranks import ALONE, Ranks
from pipeline.utils.devices import exact_float32

EVALUATION_BATCH = 128


@exact_float32()
@torch.inference_mode()
def evaluate(
    model: AdaptedModel,
    reader: Reader,
    split: Split,
    kind: TaskKind,
    *,
    device: str = "cpu",
    ranks: Ranks = ALONE,
) -> Outcomes:
    """The model's outputs for every sample of `split`, in its order, on all ranks.

    Each rank computes the samples of its shards.
    """
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    with model.merged():
        plan = evaluation_batches(split, EVALUATION_BATCH, ranks.rank, ranks.world)
        for images, targets in reader.batches(plan):
            kept = kind.kept(model(images.to(device)).cpu(), targets)
            rows.append((kept[0].numpy(), kept[1].numpy()))
    outputs, targets_N = (np.concatenate(each) for each in zip(*ranks.rows(rows), strict=True))
    rank_of_sample = deal_shards(split, ranks.world)[split.samples[:, 0]]
    index_N = np.argsort(np.argsort(rank_of_sample, kind="stable"), kind="stable")
    return Outcomes(outputs[index_N], targets_N[index_N])
