"""Classification: each sample has exactly one class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.kinds.protocol import Annotations, Label
from pipeline.kinds.registry import register_kind


@register_kind
class Classification:
    """One class per sample: int64 targets [B], cross-entropy, softmax."""

    name = "classification"
    default_metric = "accuracy"
    several_labels = False
    is_dense = False
    losses: tuple[str, ...] = ("cross_entropy",)
    selection_losses: tuple[str, ...] = ("contrastive", "cross_entropy")
    columns: tuple[tuple[str, Any], ...] = (("label", str), ("probability", float))

    def label(self, classes: Sequence[int]) -> Label:
        if len(classes) != 1:
            raise ValueError(
                f"{len(classes)} labels; expected one, or `kind: multilabel` in the task file"
            )
        return classes[0]

    def targets(self, annotations: Annotations, class_count: int) -> torch.Tensor:
        return torch.tensor(annotations, dtype=torch.int64)

    def soft_targets(self, targets: torch.Tensor, class_count: int) -> torch.Tensor:
        return F.one_hot(targets, class_count).float()

    def loss(
        self,
        outputs: torch.Tensor,
        targets: torch.Tensor,
        label_smoothing: float = 0.0,
        name: str | None = None,
    ) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def positives(self, targets: torch.Tensor) -> torch.Tensor:
        return targets[:, None] == targets[None, :]

    def kept(
        self, outputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs, targets

    def predictions(self, outputs: torch.Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
        probabilities, choices = outputs.softmax(dim=1).max(dim=1)
        pairs = zip(choices.tolist(), probabilities.tolist(), strict=True)
        return [{"label": classes[choice], "probability": each} for choice, each in pairs]
