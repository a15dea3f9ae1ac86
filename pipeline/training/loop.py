"""The one training loop: AdamW on the trained values, linear warm-up, cosine decay, cross-entropy plus the banks' balance term."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pipeline.adaptation import AdaptedModel
from pipeline.data import Reader, Split, augment, training_batches
from pipeline.errors import TrainingError
from pipeline.spec import Training
from pipeline.training.checkpoint import Checkpoint, Progress


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
    *,
    seed: int,
    flip: bool,
    device: str = "cpu",
    checkpoint: Checkpoint | None = None,
) -> Iterator[float]:
    """Train epoch by epoch; yields each epoch's mean loss, so that the caller decides whether to go on.

    Args:
        checkpoint: where the run is kept, and goes on from; epochs that it has behind it are not yielded again.

    Raises:
        TrainingError: the loss is not finite.
        StorageError: the checkpoint cannot be written.
    """
    model.compute_in(torch.bfloat16 if spec.precision == "bf16" else torch.float32)
    optimiser = torch.optim.AdamW(model.values.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True)
    steps_per_epoch = len(training_batches(split, spec.batch_size, seed=seed, epoch=0))
    steps, warmup_steps = spec.epochs * steps_per_epoch, round(spec.warmup_epochs * steps_per_epoch)
    generator = torch.Generator().manual_seed(seed)
    generators = [generator, *model.generators()]
    progress = checkpoint.restore(optimiser, generators) if checkpoint is not None else Progress()
    first_epoch, first_index = divmod(progress.step, steps_per_epoch)
    for epoch in range(first_epoch, spec.epochs):
        model.train()  # again in every epoch: the caller may have evaluated the model
        progress.losses = progress.losses if first_index else []
        plan = training_batches(split, spec.batch_size, seed=seed, epoch=epoch, window=reader.window())
        for images, labels in reader.batches(plan[first_index:]):
            for group in optimiser.param_groups:
                group["lr"] = spec.learning_rate * learning_rate_factor(progress.step, steps, warmup_steps)
            images = augment(images, generator, flip=flip) if spec.augment else images
            loss = _step(model, optimiser, images.to(device), labels.to(device), spec)
            if not math.isfinite(loss):
                rate = f"learning rate {spec.learning_rate:g}"
                raise TrainingError(f"the loss became {loss} at step {progress.step} of {steps} with {rate}; lower training.learning_rate")
            progress.step += 1
            progress.losses.append(loss)
            if checkpoint is not None:
                checkpoint.save_if_due(progress, optimiser, generators)
        yield sum(progress.losses) / len(progress.losses)
        first_index = 0
    model.eval()


def _step(model: AdaptedModel, optimiser: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor, spec: Training) -> float:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=spec.precision == "bf16"):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=spec.label_smoothing)
    optimiser.zero_grad(set_to_none=True)
    (loss + model.auxiliary_loss()).backward()
    optimiser.step()
    return float(loss.detach())
