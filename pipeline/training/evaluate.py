"""Exact evaluation: every sample once, in float32, without autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipeline.adaptation import AdaptedModel
from pipeline.data import Reader, Split, evaluation_batches
from pipeline.training.ranks import ALONE, Ranks
from pipeline.utils.devices import exact_float32

EVALUATION_BATCH = 128


@dataclass(frozen=True)
class Score:
    """Accuracy as a count, so that it is exact and can be summed over workers."""

    correct: int
    samples: int

    @property
    def accuracy(self) -> float:
        """Share of samples classified correctly, in [0, 1]."""
        return self.correct / self.samples

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.samples)


@exact_float32()
@torch.inference_mode()
def evaluate(model: AdaptedModel, reader: Reader, split: Split, *, device: str = "cpu", ranks: Ranks = ALONE) -> Score:
    """Classify every sample of `split` once, each rank those of its shards."""
    correct = 0
    with model.merged():
        for images, labels in reader.batches(evaluation_batches(split, EVALUATION_BATCH, ranks.rank, ranks.world)):
            correct += int((model(images.to(device)).argmax(dim=1).cpu() == labels).sum())
    return Score(ranks.total(correct), len(split.samples))
