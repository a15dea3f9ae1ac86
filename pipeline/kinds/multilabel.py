"""Multi-label classification: each sample has any number of classes, also none.

Every class is a question of its own, answered by a sigmoid; a class is predicted where its
probability is above 0.5. With label smoothing s, targets t become (1 - s) t + s / 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.kinds.protocol import Annotations, Label, classes_in
from pipeline.kinds.registry import register_kind

THRESHOLD = 0.5
"""A class is predicted where its probability is larger."""


@register_kind
class MultiLabel:
    """Any number of classes per sample: float32 targets [B, C] of 0 and 1, binary cross-entropy."""

    name = "multilabel"
    default_metric = "mAP"
    several_labels = True
    is_dense = False
    losses: tuple[str, ...] = ("binary_cross_entropy",)
    selection_losses: tuple[str, ...] = ("contrastive", "cross_entropy")
    columns: tuple[tuple[str, Any], ...] = (
        ("labels", list[str]),
        ("probabilities", dict[str, float]),
    )

    def label(self, classes: Sequence[int]) -> Label:
        label = tuple(sorted(set(classes)))
        if len(label) < len(classes):
            raise ValueError("a class is given twice; give each label of a sample once")
        return label

    def targets(self, annotations: Annotations, class_count: int) -> torch.Tensor:
        targets = torch.zeros(len(annotations), class_count)
        for row, label in zip(targets, annotations, strict=True):
            row[list(classes_in(label))] = 1
        return targets

    def soft_targets(self, targets: torch.Tensor, class_count: int) -> torch.Tensor:
        return targets

    def loss(
        self,
        outputs: torch.Tensor,
        targets: torch.Tensor,
        label_smoothing: float = 0.0,
        name: str | None = None,
    ) -> torch.Tensor:
        smoothed = targets * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(outputs, smoothed)

    def positives(self, targets: torch.Tensor) -> torch.Tensor:
        """Pairs that share a class, or that both have none."""
        has_none = targets.sum(dim=1) == 0
        return (targets @ targets.T > 0) | (has_none[:, None] & has_none[None, :])

    def kept(
        self, outputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs, targets.to(torch.uint8)

    def predictions(self, outputs: torch.Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
        rows = (dict(zip(classes, row, strict=True)) for row in outputs.sigmoid().tolist())
        return [
            {
                "labels": [name for name, each in row.items() if each > THRESHOLD],
                "probabilities": row,
            }
            for row in rows
        ]
