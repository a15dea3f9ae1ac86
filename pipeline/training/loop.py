"""The one training loop: AdamW on the trained values, linear warm-up, cosine decay, the task kind's
loss plus the banks' balance term.

What the papers add to it (augmentation, mixup and CutMix, label smoothing, a moving average of the
trained values) is off by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from pipeline.adaptation import AdaptedModel
from pipeline.data import Reader, Split, augment, deal_shards, numbered_generator, training_batches
from pipeline.errors import TrainingError
from pipeline.kinds import TaskKind
from pipeline.specs import Training
from pipeline.training.averaging import MovingAverage
from pipeline.training.mixing import mix
from pipeline.training.ranks import ALONE, Ranks
from pipeline.training.run_checkpoint import Checkpoint, Progress
from pipeline.utils.devices import computing_dtype, exact_float32


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear rise over `warmup_steps`, then half a cosine down to zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))


def train_epochs(
    model: AdaptedModel,
    reader: Reader,
    split: Split,
    spec: Training,
    kind: TaskKind,
    *,
    seed: int,
    flip: bool,
    device: str = "cpu",
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[float]:
    """Train epoch by epoch; yields each epoch's mean loss, so that the caller decides whether to go
    on.

    With `spec.ema`, the model holds the averaged values wherever the caller sees it.

    Args:
        checkpoint: where the run is kept, and goes on from; epochs that it has behind it are not
            yielded again.
        ranks: who trains the model with this process, each with the samples of its own shards.

    Raises:
        ClusterError: the ranks no longer have the same values.
        TrainingError: the loss is not finite.
        StorageError: the checkpoint cannot be written.
    """
    peak, dtype = spec.learning_rate, computing_dtype(spec.precision, device)
    assert peak is not None, "the recipe's learning rate is settled by with_learning_rate"
    model.compute_in(dtype)
    optimiser = torch.optim.AdamW(
        model.values.parameters(), lr=peak, weight_decay=spec.weight_decay, fused=True
    )
    average = MovingAverage(optimiser, spec.ema)
    steps_per_epoch = len(training_batches(split, spec.batch_size, seed=seed, epoch=0))
    steps, warmup_steps = spec.epochs * steps_per_epoch, round(spec.warmup_epochs * steps_per_epoch)
    shards = np.flatnonzero(deal_shards(split, ranks.world) == ranks.rank)
    progress = checkpoint.restore(optimiser, ranks) if checkpoint is not None else Progress()
    first_epoch, first_index = divmod(progress.step, steps_per_epoch)
    for epoch in range(first_epoch, spec.epochs):
        model.train()  # again in every epoch: the caller may have evaluated the model
        progress.losses = progress.losses if first_index else []
        plan = training_batches(
            split, spec.batch_size, seed, epoch, ranks.rank, ranks.world, reader.window(shards)
        )
        for images, targets in reader.batches(plan[first_index:]):
            for group in optimiser.param_groups:
                group["lr"] = peak * learning_rate_factor(progress.step, steps, warmup_steps)
            generator = numbered_generator(ranks.seed(seed), progress.step)
            model.reseed(generator)
            images = (
                augment(images, generator, flip, spec.augment) if spec.augment != "none" else images
            )
            if (spec.mixup or spec.cutmix) and len(images):
                soft_targets = kind.soft_targets(targets, model.class_count)
                images, targets = mix(images, soft_targets, spec, generator)
            loss = _step(
                model, optimiser, images.to(device), targets.to(device), spec, kind, dtype, ranks
            )
            if not math.isfinite(loss):
                at = f"at step {progress.step} of {steps} with learning rate {peak:g}"
                raise TrainingError(f"the loss became {loss} {at}; lower training.learning_rate")
            average.update(progress.step)
            progress.step += 1
            progress.losses.append(loss)
            if checkpoint is not None and ranks.is_first and checkpoint.is_due():
                checkpoint.save(progress, optimiser, ranks)
        ranks.check_agree(model.values.state_dict())
        average.swap()
        yield sum(progress.losses) / len(progress.losses)
        average.swap()
        first_index = 0
    average.swap()
    model.eval()


@exact_float32()
def _step(
    model: AdaptedModel,
    optimiser: torch.optim.Optimizer,
    images: torch.Tensor,
    targets: torch.Tensor,
    spec: Training,
    kind: TaskKind,
    dtype: torch.dtype,
    ranks: Ranks,
) -> float:
    """The mean loss over all ranks. A rank may have no images."""
    optimiser.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=images.device)
    if len(images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(images)
        loss = kind.loss(logits.float(), targets, spec.label_smoothing)
        (loss + model.auxiliary_loss()).backward()
    loss = ranks.mean_gradients(list(model.values.parameters()), loss, len(images))
    optimiser.step()
    return float(loss.detach())
