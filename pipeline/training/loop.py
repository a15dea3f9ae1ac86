"""The one training loop: AdamW on the trained values, linear warm-up, cosine decay, the task kind's
loss plus the banks' balance term.

What the papers add to it (augmentation, mixup and CutMix, label smoothing, a moving average of the
trained values) is off by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from pipeline.adaptation import AdaptedModel
from pipeline.data import (
    Split,
    deal_shards,
    numbered_generator,
    training_batches,
)
from pipeline.data.batch_plan import Batches
from pipeline.errors import TrainingError
from pipeline.kinds import TaskKind
from pipeline.specs import Training
from pipeline.training.averaging import MovingAverage
from pipeline.training.mixing import mix
from pipeline.training.passes import Passes
from pipeline.training.ranks import ALONE, Ranks
from pipeline.training.recorded import RecordedStep, Step
from pipeline.training.run_checkpoint import Checkpoint, Progress
from pipeline.utils.devices import (
    autocast,
    can_record,
    computing_dtype,
    exact_float32,
    to_device,
)
from pipeline.utils.sending import Batch, sent

READ_EVERY = 20
"""Steps after which their losses are read, for which a GPU is waited for."""


class BatchSource(Protocol):
    """What is trained on: a `Reader` of a split, or one with other targets than labels."""

    def window(self, numbers: Iterable[int] | None = None) -> int | None: ...

    def batches(
        self, plan: Sequence[np.ndarray]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]: ...


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear rise over `warmup_steps`, then half a cosine down to zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))


def train_epochs(
    model: AdaptedModel,
    reader: BatchSource,
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
    """Train epoch by epoch and yield each epoch's mean loss; the caller decides whether to go on.

    With `spec.ema`, the model holds the averaged values wherever the caller sees it.

    Args:
        checkpoint: where the run is saved and resumed; epochs already run are not yielded again.
        ranks: the processes that train the model together, each on the samples of its own shards.

    Raises:
        ClusterError: the ranks no longer have the same values.
        TrainingError: the loss is not finite.
        StorageError: the checkpoint cannot be written.
    """
    steps_per_epoch = len(training_batches(split, spec.batch_size, seed=seed, epoch=0))
    trainer = _Trainer(model, spec, kind, steps_per_epoch, seed, flip, device, ranks)
    average = MovingAverage(trainer.optimiser, spec.ema)
    progress = checkpoint.restore(trainer.optimiser, ranks) if checkpoint else Progress()
    first_epoch, first_index = divmod(progress.step, steps_per_epoch)
    for epoch in range(first_epoch, spec.epochs):
        model.train()  # again in every epoch: the caller may have evaluated the model
        progress.losses = progress.losses if first_index else []
        batches = _batches_of_rank(reader, split, spec.batch_size, seed, epoch, ranks)
        for images, targets in trainer.on_device(reader.batches(batches[first_index:])):
            trainer.step(images, targets, progress.step)
            average.update(progress.step)
            progress.step += 1
            trainer.save_if_due(progress, checkpoint)
        progress.losses += trainer.read_losses(progress.step)
        ranks.check_agree(model.values.state_dict())
        average.swap()
        yield sum(progress.losses) / len(progress.losses)
        average.swap()
        first_index = 0
    average.swap()
    model.eval()


def _batches_of_rank(
    reader: BatchSource, split: Split, batch_size: int, seed: int, epoch: int, ranks: Ranks
) -> Batches:
    """This rank's part of every batch of an epoch."""
    shards = np.flatnonzero(deal_shards(split, ranks.world) == ranks.rank)
    window = reader.window(shards)
    return training_batches(split, batch_size, seed, epoch, ranks.rank, ranks.world, window)


@dataclass
class _Trainer:
    """Trains a model with AdamW, batch by batch."""

    model: AdaptedModel
    spec: Training
    kind: TaskKind
    steps_per_epoch: int
    seed: int
    flip: bool
    device: str
    ranks: Ranks
    optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        peak = self.spec.learning_rate
        assert peak is not None, "the recipe's learning rate is settled by with_learning_rate"
        self._peak, self._dtype = peak, computing_dtype(self.spec.precision, self.device)
        self.model.compute_in(self._dtype)
        # What is computed again sets generators back, which a recording cannot.
        is_plain = self.ranks.world > 1 or bool(self.spec.recompute)
        is_recorded = can_record(self.device) and not is_plain
        # A recorded step reads its learning rate from the device.
        self.optimiser = torch.optim.AdamW(
            self.model.values.parameters(),
            lr=torch.tensor(peak, device=self.device) if is_recorded else peak,
            weight_decay=self.spec.weight_decay,
            fused=True,
            capturable=is_recorded,
        )
        self._is_recorded, self._losses = is_recorded, list[torch.Tensor]()
        self._passes = Passes(self.spec.micro_batch or self.spec.batch_size, self.device)
        self._step = self._step_of(self._passes.size)

    def _step_of(self, size: int) -> Step:
        """A step in passes of `size` images. It does not refer to the trainer, so that the model's
        memory is freed with the trainer.
        """
        self._step_size, model, optimiser = size, self.model, self.optimiser
        settings = self.spec, self.kind, self._dtype, self.ranks, size

        def step(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return _step(model, optimiser, images, targets, *settings)

        return RecordedStep(step, self.device, model.generators) if self._is_recorded else step

    def _step_in_passes(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of a step. Several ranks wait for each other in a step, so that none of them can
        try it again.
        """

        def step(size: int) -> torch.Tensor:
            if size != self._step_size:
                self._step = self._step_of(size)
                self.model.rewind()
            return self._step(inputs, targets)

        is_alone = self.ranks.world == 1
        return self._passes.fit(step, len(inputs)) if is_alone else step(self._passes.size)

    def on_device(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches on the device; of a model that keeps its trunk, on the CPU, whose images it
        knows.
        """
        return batches if self.model.keeps_trunk else sent(batches, self.device)

    def save_if_due(self, progress: Progress, checkpoint: Checkpoint | None) -> None:
        """Read the losses from time to time, and before the checkpoint is saved. Several ranks read
        them in every step, so that all see in the same step that one is not finite.
        """
        is_due = checkpoint is not None and self.ranks.is_first and checkpoint.is_due()
        if is_due or len(self._losses) >= (READ_EVERY if self.ranks.world == 1 else 1):
            progress.losses += self.read_losses(progress.step)
        if checkpoint is not None and is_due:
            checkpoint.save(progress, self.optimiser, self.ranks)

    def step(self, images: torch.Tensor, targets: torch.Tensor, step: int) -> None:
        """Make step number `step`, counted from 0, on a batch."""
        self._set_learning_rate(step)
        generator = numbered_generator(self.ranks.seed(self.seed), step)
        self.model.reseed(generator)
        with autocast(self.device, self._dtype):
            inputs = self.model.inputs_of(images)
        inputs, targets = self._varied(inputs, to_device(targets, self.device), generator)
        self._losses.append(self._step_in_passes(inputs, targets))

    def read_losses(self, next_step: int) -> list[float]:
        """The mean losses, over all ranks, of the steps before `next_step` that are not read yet.

        Raises:
            TrainingError: one is not finite.
        """
        losses = torch.stack(self._losses).tolist() if self._losses else []
        self._losses.clear()
        for step, loss in enumerate(losses, start=next_step - len(losses)):
            if not math.isfinite(loss):
                at = f"at step {step} of {self._steps} with learning rate {self._peak:g}"
                raise TrainingError(f"the loss became {loss} {at}; lower training.learning_rate")
        return losses

    @property
    def _steps(self) -> int:
        return self.spec.epochs * self.steps_per_epoch

    def _set_learning_rate(self, step: int) -> None:
        warmup_steps = round(self.spec.warmup_epochs * self.steps_per_epoch)
        rate = self._peak * learning_rate_factor(step, self._steps, warmup_steps)
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _varied(
        self, images: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch augmented and mixed as the recipe says."""
        spec = self.spec
        if spec.augment != "none":
            images, targets = self.model.takes.augment(
                images, targets, generator, self.flip, spec.augment
            )
        if (spec.mixup or spec.cutmix) and len(images):
            soft_targets = self.kind.soft_targets(targets, self.model.class_count)
            return mix(images, soft_targets, spec, generator)
        return images, targets


@exact_float32()
def _step(
    model: AdaptedModel,
    optimiser: torch.optim.Optimizer,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    spec: Training,
    kind: TaskKind,
    dtype: torch.dtype,
    ranks: Ranks,
    micro_batch: int,
) -> torch.Tensor:
    """Train on a batch, in passes of `micro_batch` images; the mean loss [] over all ranks. A rank
    may have no images.
    """
    optimiser.zero_grad(set_to_none=True)
    loss: torch.Tensor | None = None
    for some, wanted in zip(inputs.split(micro_batch), targets.split(micro_batch), strict=True):
        if not len(some):
            break
        with autocast(inputs.device.type, dtype):
            logits = model.logits_of(some)
        mean = kind.loss(logits.float(), wanted, spec.label_smoothing, spec.loss)
        total = mean + model.auxiliary_loss()
        if len(some) == len(inputs):
            loss = mean
        else:
            share = len(some) / len(inputs)
            part, total = mean.detach() * share, total * share
            loss = part if loss is None else loss + part
        total.backward()
    if loss is None:
        loss = torch.zeros((), device=inputs.device)
    loss = ranks.mean_gradients(list(model.values.parameters()), loss, len(inputs))
    optimiser.step()
    return loss.detach()
