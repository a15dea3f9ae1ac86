"""Training settings of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from pipeline.specs.section import Spec
from pipeline.utils.precision import Precision


def _named_augmentation(value: Any) -> Any:
    """Earlier versions wrote `augment: true` or `false`, and so do their packs."""
    return {True: "light", False: "none"}[value] if isinstance(value, bool) else value


Augmentation = Literal["none", "light", "crop", "strong"]
"""Augmentation, see pipeline/data/augment.py for images, pipeline/data/points.py for clouds."""


class Training(Spec):
    """AdamW; cosine decay of the learning rate after a linear warm-up."""

    epochs: int = Field(12, ge=1, description="passes over the training set")
    batch_size: int = Field(32, ge=1, description="images per step, over all ranks")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description=(
            "images per pass: the gradients of a step's passes add up, and memory is that of one;"
            " default: the whole batch, halved as often as memory runs out"
        ),
    )
    recompute: bool | None = Field(
        None,
        description=(
            "compute each block again in the backward pass rather than keep what it computed:"
            " memory of about one block, a third more time"
        ),
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak of the learning rate; default: derived from the backbone's width",
    )
    warmup_epochs: float = Field(
        default_factory=lambda validated: min(1.0, validated.get("epochs", 1) / 2),
        ge=0,
        description="linear warm-up; default: 1, or half the epochs if there are fewer than two",
    )
    loss: str | None = Field(
        None,
        description=(
            "default: the kind's own; of segmentation `cross_entropy_dice`, or `bce_iou`, that of"
            " GPS's recipe for SAM"
        ),
    )
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the cross-entropy")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth: rate of the last block"
    )
    mixup: float = Field(0.0, ge=0, description="alpha of the Beta distribution; 0: off")
    cutmix: float = Field(0.0, ge=0, description="alpha of the Beta distribution; 0: off")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "decay of a moving average of the trained values, which the pack gets; 0: the last"
            " values"
        ),
    )
    distill: float | None = Field(
        None,
        gt=0,
        le=1,
        description=(
            "share of the targets that comes from a teacher, the whole backbone fine-tuned on the"
            " same images before; of kind classification"
        ),
    )
    augment: Annotated[Augmentation, BeforeValidator(_named_augmentation)] = Field(
        "none", description="augmentation of the training images"
    )

    @model_validator(mode="after")
    def _has_one_kind_of_targets(self) -> Self:
        if self.distill is not None and (self.mixup or self.cutmix):
            raise ValueError(
                "distill has a teacher's outputs for whole images, which mixup and cutmix mix;"
                " leave out one or the other"
            )
        return self

    @property
    def repeats_images(self) -> bool:
        """Whether an image is the same in every epoch."""
        return self.augment == "none" and not self.mixup and not self.cutmix

    precision: Precision = Field(
        "bf16", description="of the passes; `bf16` becomes float32 on devices without units for it"
    )
