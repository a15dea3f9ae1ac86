"""The protocol of a task kind: everything that differs between kinds of tasks.

A dataset's labels become class numbers (`pipeline.data.labels`), which `label` checks and converts
to what the index stores; `targets` makes a tensor of a batch's labels, which the losses read.
`kept` reduces a sample's output to what metrics need.

Every kind's head has one output per class. A dense kind's has one per class and pixel: its samples
have masks beside their labels, images of class numbers, which are cropped and flipped with them.

Legend: B samples of a batch, N samples, C classes, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

Label = int | tuple[int, ...]
"""A sample's class, or its classes in ascending order, as the index keeps them."""
Annotations = Sequence[Label] | torch.Tensor
"""What a batch's targets are made of: labels or, of a dense kind, masks, uint8 [B, S, S]."""
IGNORED = 255
"""A mask's value at pixels that neither losses nor metrics count."""


def classes_in(label: Label) -> tuple[int, ...]:
    """The classes of a label, whichever form it has."""
    return (label,) if isinstance(label, int) else label


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Stored outputs and targets of every sample of a split, in the split's order: the input of
    metrics.

    outputs: [N, ...], such as logits [N, C]; targets: [N, ...].
    """

    outputs: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        assert len(self.outputs) == len(self.targets), "a target for each output"

    def __len__(self) -> int:
        return len(self.targets)

    def only(self, number: int) -> Outcomes:
        """Those of one sample."""
        return Outcomes(self.outputs[[number]], self.targets[[number]])


class TaskKind(Protocol):
    """A kind of task. `name` is what a task file says in `kind`, `default_metric` what a study
    maximises unless the task file says otherwise."""

    name: str
    default_metric: str
    several_labels: bool
    """Whether a sample may have any number of labels, also none; otherwise it has one."""
    is_dense: bool
    """Whether targets are masks, and outputs [B, C, S, S]; otherwise outputs are [B, C]."""
    losses: tuple[str, ...]
    """The losses to train by, the default first."""
    selection_losses: tuple[str, ...]
    """The losses by which connections can be ranked, the default first."""
    columns: tuple[tuple[str, Any], ...]
    """The keys of a prediction, each with the type of its value: str, float, list[str],
    dict[str, float], or bytes, which are a PNG."""

    def label(self, classes: Sequence[int]) -> Label:
        """The label of a sample with these class numbers. Raises ValueError where they are none of
        this kind."""
        ...

    def targets(self, annotations: Annotations, class_count: int) -> torch.Tensor:
        """Targets of a batch for the losses, [B, ...]."""
        ...

    def soft_targets(self, targets: torch.Tensor, class_count: int) -> torch.Tensor:
        """The same as float32, such that mixtures of two targets are targets, too: for mixup."""
        ...

    def loss(
        self,
        outputs: torch.Tensor,
        targets: torch.Tensor,
        label_smoothing: float = 0.0,
        name: str | None = None,
    ) -> torch.Tensor:
        """The mean training loss of outputs [B, ...] in float32; targets may be soft. `name` is one
        of `losses`, by default the first.
        """
        ...

    def positives(self, targets: torch.Tensor) -> torch.Tensor:
        """Positive pairs of a contrastive loss, bool [B, B]; not of a kind without that loss."""
        ...

    def kept(
        self, outputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `Outcomes` stores of a batch: a row per sample, no larger than metrics need."""
        ...

    def predictions(self, outputs: torch.Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
        """One dictionary with `columns` per row of outputs [B, ...], as `predict` prints it; of a
        dense kind per mask of class numbers, uint8 [B, H, W], in the size of its image.
        """
        ...
