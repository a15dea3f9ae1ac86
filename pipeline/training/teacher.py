"""Distillation (arXiv 1503.02531): a pack learns from the labels and from a teacher, the whole
backbone fine-tuned on the same images.

    target = (1 - s) label + s softmax(teacher's output),  s = training.distill

The teacher trains for as many epochs as the pack. Its outputs for the images as they are stored are
computed once and kept by the process, so that the trials of a study share them. Legend: N samples,
B of a batch, C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from pipeline.data import Reader, Split
from pipeline.errors import TrainingError
from pipeline.inputs.task_inputs import Inputs
from pipeline.specs import Full, Head, Recipe
from pipeline.training.evaluate import evaluate
from pipeline.training.loop import BatchSource, train_epochs
from pipeline.training.ranks import ALONE, Ranks
from pipeline.utils.byte_cache import ByteCache

RATE_SHARE = 1 / 16
"""The teacher's learning rate, relative to the pack's: 0.0005 at a width of 192, where 0.0001 to
0.001 were the best of full fine-tuning (benchmarks/results/methods).
"""
KEPT_BYTES = 1 << 28
_KEPT: ByteCache[str, torch.Tensor] = ByteCache()


class Taught:
    """The batches of a reader with other targets: targets [N, C] of the samples of `split`."""

    def __init__(self, reader: Reader, split: Split, targets_NC: torch.Tensor) -> None:
        self._reader, self._targets_NC = reader, targets_NC
        self._rows = {tuple(sample): row for row, sample in enumerate(split.samples.tolist())}

    def window(self, numbers: Iterable[int] | None = None) -> int | None:
        """As the reader's."""
        return self._reader.window(numbers)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As the reader's, with targets float32 [B, C]."""
        for samples, (images, _) in zip(plan, self._reader.batches(plan), strict=True):
            rows = [self._rows[tuple(sample)] for sample in samples.tolist()]
            yield images, self._targets_NC[rows]


def training_source(
    inputs: Inputs, split_name: str, recipe: Recipe, *, device: str = "cpu", ranks: Ranks = ALONE
) -> BatchSource:
    """What a recipe, its learning rate settled, trains on: the split's samples with their labels,
    or with the targets of `distill`, for which a teacher is trained first.

    Raises:
        TrainingError: the teacher's loss diverges.
    """
    reader, split = inputs.reader(split_name), inputs.splits[split_name]
    share = recipe.training.distill
    if share is None:
        return reader
    logits_NC = _teacher_logits(inputs, split_name, recipe, device, ranks)
    labels_N = torch.from_numpy(split.labels)
    labels_NC = inputs.kind.soft_targets(labels_N, len(inputs.index.classes))
    return Taught(reader, split, labels_NC.lerp(logits_NC.softmax(dim=1), share))


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the teacher of a recipe whose learning rate is settled."""
    rate = recipe.training.learning_rate
    assert rate is not None, "the recipe's learning rate is settled by with_learning_rate"
    training = recipe.training.changed(distill=None, learning_rate=rate * RATE_SHARE)
    return Recipe(full=Full(bits=32), head=Head(bits=32), training=training)


def _teacher_logits(
    inputs: Inputs, split_name: str, recipe: Recipe, device: str, ranks: Ranks
) -> torch.Tensor:
    """The outputs of the trained teacher for every sample of a split, float32 [N, C]."""
    taught, split, task = teacher_recipe(recipe), inputs.splits[split_name], inputs.task
    key = _key(inputs, split, taught)
    if (kept := _KEPT.get(key)) is not None:
        return kept
    model, reader = inputs.adapted(taught, None).to(device), inputs.reader(split_name)
    try:
        for _ in train_epochs(
            model,
            reader,
            split,
            taught.training,
            inputs.kind,
            seed=task.seed,
            flip=task.input.flip,
            device=device,
            ranks=ranks,
        ):
            pass
    except TrainingError as error:
        raise TrainingError(
            f"the teacher, which training.distill asks for, diverged: {error}, or leave out distill"
        ) from None
    outcomes = evaluate(model, reader, split, inputs.kind, ranks=ranks)
    logits_NC = torch.from_numpy(outcomes.outputs).float()
    _KEPT.put(key, logits_NC, logits_NC.numel() * logits_NC.element_size())
    _KEPT.trim(KEPT_BYTES, at_least=1)
    return logits_NC


def _key(inputs: Inputs, split: Split, taught: Recipe) -> str:
    """SHA-256 hex over everything that the teacher's outputs depend on."""
    content = [
        inputs.backbone.fingerprint,
        inputs.index.digest,
        [*inputs.backbone.takes.identity, inputs.task.input.flip],
        inputs.task.seed,
        taught.model_dump(mode="json"),
        hashlib.sha256(split.samples.tobytes()).hexdigest(),
        [shard.sha256 for shard in split.shards],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
