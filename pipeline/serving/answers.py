"""What a pack says of an image: its kind's answer and, with a calibration, a set of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.kinds import TaskKind
from pipeline.packs import Calibration

SET_COLUMN: tuple[str, Any] = ("set", list[str])


def answers(
    kind: TaskKind, classes: Sequence[str], calibration: Calibration | None, logits: torch.Tensor
) -> list[dict[str, Any]]:
    """One row per row of logits, by the kind. With a calibration, probabilities are calibrated, and
    `set` holds the classes that are probable enough for its coverage, the most probable first: none
    of them, where the pack does not know.
    """
    if calibration is None:
        return kind.predictions(logits, classes)
    logits_NC = logits / calibration.temperature
    rows = kind.predictions(logits_NC, classes)
    for row, shares in zip(rows, logits_NC.softmax(dim=1).tolist(), strict=True):
        ranked = sorted(zip(shares, classes, strict=True), key=lambda pair: -pair[0])
        row["set"] = [name for share, name in ranked if share >= calibration.threshold]
    return rows
