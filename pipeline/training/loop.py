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


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear rise over `warmup_steps`, then half a cosine down to zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))


def train_epochs(model: AdaptedModel, reader: Reader, split: Split, spec: Training, *, seed: int, flip: bool, device: str = "cpu") -> Iterator[float]:
    """Train epoch by epoch; yields each epoch's mean loss, so that the caller decides whether to go on.

    Raises:
        TrainingError: the loss is not finite.
    """
    model.compute_in(torch.bfloat16 if spec.precision == "bf16" else torch.float32)
    optimiser = torch.optim.AdamW(model.values.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True)
    steps_per_epoch = len(training_batches(split, spec.batch_size, seed=seed, epoch=0))
    steps, warmup_steps = spec.epochs * steps_per_epoch, round(spec.warmup_epochs * steps_per_epoch)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(spec.epochs):
        model.train()  # again in every epoch: the caller may have evaluated the model
        losses = []
        plan = training_batches(split, spec.batch_size, seed=seed, epoch=epoch, window=reader.window())
        for index, (images, labels) in enumerate(reader.batches(plan)):
            step = epoch * steps_per_epoch + index
            for group in optimiser.param_groups:
                group["lr"] = spec.learning_rate * learning_rate_factor(step, steps, warmup_steps)
            images = augment(images, generator, flip=flip) if spec.augment else images
            losses.append(_step(model, optimiser, images.to(device), labels.to(device), spec))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss became {losses[-1]} at step {step} of {steps} with learning rate {spec.learning_rate:g}; lower training.learning_rate"
                )
        yield sum(losses) / len(losses)
    model.eval()


def _step(model: AdaptedModel, optimiser: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor, spec: Training) -> float:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=spec.precision == "bf16"):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=spec.label_smoothing)
    optimiser.zero_grad(set_to_none=True)
    (loss + model.auxiliary_loss()).backward()
    optimiser.step()
    return float(loss.detach())
