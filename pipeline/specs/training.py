"""How a recipe is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
)

from pipeline.specs.section import Spec


def _named_augmentation(value: Any) -> Any:
    """Earlier versions wrote `augment: true` or `false`, and so do their packs."""
    return {True: "light", False: "none"}[value] if isinstance(value, bool) else value


Augmentation = Literal["none", "light", "crop", "strong"]
"""How images are varied, see pipeline/data/augment.py."""


class Training(Spec):
    """One loop: AdamW, cosine decay after a linear warm-up, cross-entropy.

    ema: decay of a moving average of the trained values, which is what the pack gets; 0 takes the last values. mixup, cutmix: the alpha of their Beta
    distributions, 0 for off.

    learning_rate: its peak; where it is left out, the backbone's own, see pipeline/inputs/learning_rate.py.

    precision: of the passes; `bf16` is float32 on a processor without units for it, which would be slower.
    """

    epochs: int = Field(12, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    warmup_epochs: float = Field(default_factory=lambda validated: min(1.0, validated.get("epochs", 1) / 2), ge=0)
    weight_decay: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth: the last block's rate")
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    augment: Annotated[Augmentation, BeforeValidator(_named_augmentation)] = "none"
    precision: Literal["fp32", "bf16"] = "bf16"
