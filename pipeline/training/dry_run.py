"""What a trial takes of a GPU, by a few of its training steps and a batch of its validation, and
how many trials a GPU holds.

Without NVIDIA's MPS, the processes on a GPU take turns: they can share the time in which it idles,
and no other. So the share of the time in which one process keeps it busy says how many there is
time for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pipeline.adaptation import AdaptedModel, SelectedIndex
from pipeline.data import Split
from pipeline.inputs.learning_rate import with_learning_rate
from pipeline.inputs.task_inputs import Inputs
from pipeline.specs import Recipe
from pipeline.training.evaluate import batch_size, evaluate
from pipeline.training.loop import READ_EVERY, train_epochs
from pipeline.training.teacher import teacher_recipe
from pipeline.training.usage import SAMPLE_SECONDS
from pipeline.utils.devices import (
    busy_share,
    forget_peak,
    memory_bytes,
    process_memory_bytes,
    release_memory,
)

MOST = 4
"""Trials per GPU: each has a CUDA context, a backbone and CPUs of its own, and the more take turns,
the less each of them gains.
"""
USABLE = 0.95
"""Share of a GPU's memory that trials may fill."""
MARGIN = 1.25
"""A trial's memory, relative to that of a dry run: there are other points in the search space, and
a long run leaves gaps between its tensors.
"""
WARM_STEPS = READ_EVERY
"""Steps before the GPU is looked at: they choose algorithms and record the step, and after the last
one the host has waited for the GPU.
"""
SAMPLES = 5
"""How often the GPU is looked at."""
_GIB = 1 << 30
_RATE = 1e-6
"""So small that no loss diverges; neither time nor memory depends on it."""
_ENDLESS = 1 << 20


@dataclass(frozen=True)
class GpuNeed:
    """What a trial takes of a GPU.

    Attributes:
        memory_bytes: the most memory that its process took, with CUDA's context.
        total_bytes: the GPU's memory.
        busy: share of the time of training in which the GPU computed; None where the driver does
            not tell.
    """

    memory_bytes: int
    total_bytes: int
    busy: float | None

    def trials_per_gpu(self) -> int:
        """How many such trials a GPU has memory and time for, at least one. Where it is unknown how
        busy one keeps it, one.
        """
        for_memory = int(USABLE * self.total_bytes / (MARGIN * self.memory_bytes))
        for_time = int(1 / max(1 if self.busy is None else self.busy, 1 / MOST))
        return max(1, min(for_memory, for_time, MOST))

    def line(self) -> str:
        """Summary for a log: `a trial takes 9.1 of 80.0 GiB and keeps the GPU 28% busy`."""
        taken, total = self.memory_bytes / _GIB, self.total_bytes / _GIB
        takes = f"a trial takes {taken:.1f} of {total:.1f} GiB"
        if self.busy is None:
            return f"{takes}, and NVIDIA's library does not tell how busy it keeps the GPU"
        return f"{takes} and keeps the GPU {self.busy:.0%} busy"


def dry_run(inputs: Inputs, selected: SelectedIndex | None, device: str) -> GpuNeed:
    """What a trial takes of an accelerator that no other process uses, at most: of recipes that
    have, together, all parts of the search space. It takes about ten seconds per recipe.

    Args:
        selected: the connections, where a recipe trains some.

    Raises:
        OutOfMemory: The device has no room for a pass over one image, or for two batches of images.
    """
    release_memory(device)
    forget_peak(device)
    recipes = inputs.task.search.fullest(inputs.task.recipe)
    busy = [_busy(inputs, recipe, selected, device) for recipe in _with_teachers(inputs, recipes)]
    known = [share for share in busy if share is not None]
    return GpuNeed(
        memory_bytes=process_memory_bytes(device),
        total_bytes=memory_bytes(device)[1],
        busy=max(known) if len(known) == len(busy) else None,
    )


def _with_teachers(inputs: Inputs, recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes and those of their teachers, which trials train as well."""
    settled = [with_learning_rate(recipe, inputs.backbone) for recipe in recipes]
    taught = [recipe for recipe in settled if recipe.training.distill is not None]
    return [*settled, *(teacher_recipe(recipe) for recipe in taught)]


def _busy(
    inputs: Inputs, recipe: Recipe, selected: SelectedIndex | None, device: str
) -> float | None:
    """Train for a few seconds as a trial does, then validate a batch; the share of the time in
    which the device was busy with training.
    """
    model = inputs.adapted(recipe, selected).to(device)
    spec = recipe.training.changed(epochs=_ENDLESS, learning_rate=_RATE)
    split = inputs.splits["train"]
    images, targets = inputs.reader("train").read(split.samples[: spec.batch_size])
    steps = _WatchedSteps(images, targets, device)
    options: dict[str, Any] = {"flip": inputs.task.input.flip, "device": device}
    epochs = train_epochs(model, steps, split, spec, inputs.kind, seed=inputs.task.seed, **options)
    while not steps.are_over:
        next(epochs)
    _validate(inputs, model)
    return sum(steps.busy) / len(steps.busy) if steps.busy else None


def _validate(inputs: Inputs, model: AdaptedModel) -> None:
    """Validate as many samples as a trial does at once."""
    split = _first(inputs.splits["val"], batch_size(model.device))
    evaluate(model, inputs.reader("val"), split, inputs.kind, is_exact=False)


def _first(split: Split, count: int) -> Split:
    """The first samples of a split."""
    return replace(split, samples=split.samples[:count], labels=split.labels[:count])


@dataclass
class _WatchedSteps:
    """Trains on the same batch again and again, until the device has been looked at often enough
    after the first steps, or does not tell how busy it is.
    """

    images: torch.Tensor
    targets: torch.Tensor
    device: str
    busy: list[float] = field(default_factory=list)
    are_over: bool = False
    _steps: int = 0
    _looked: float = 0.0

    def window(self, numbers: Iterable[int] | None = None) -> int | None:
        """As a reader's."""
        return None

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batch, at most as often as a plan has batches."""
        for _ in plan:
            yield self.images, self.targets
            self._steps += 1
            self._look()
            if self.are_over:
                return

    def _look(self) -> None:
        if self._steps < WARM_STEPS:
            return
        now = time.monotonic()
        if self._steps == WARM_STEPS:
            self._looked, self.are_over = now, busy_share(self.device) is None
        elif now - self._looked >= SAMPLE_SECONDS:
            self._looked, share = now, busy_share(self.device)
            self.busy += [] if share is None else [share]
            self.are_over = share is None or len(self.busy) == SAMPLES
