"""Selection settings of a task."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    model_validator,
)

from pipeline.specs.section import Spec
from pipeline.specs.training import Augmentation
from pipeline.utils.precision import Precision

Level = Literal["neuron", "layer", "network"]
Criterion = Literal["gradient", "magnitude", "activation", "random"]


class Selection(Spec):
    """Which connections `top_k` keeps (GPS, arXiv 2312.10136): how important one is, and which of
    them compete with each other.

    The importance is `gradient`, the absolute value of the loss's gradient summed over the training
    set; `magnitude`, the size of the weight; `activation`, that times the mean size of its input,
    without a backward pass (FPS, arXiv 2510.27359); or `random`, drawn by `seed`.
    """

    criterion: Criterion = Field("gradient", description="importance of a connection")
    level: Level = Field("neuron", description="which connections compete with each other")
    loss: Literal["contrastive", "cross_entropy"] = Field(
        "contrastive",
        description="of `gradient`; contrastive: of two views; cross_entropy: of an untrained head",
    )
    views: Augmentation = Field(
        "strong", description="augmentation of the two views of each image; `strong` is GPS's"
    )
    temperature: float = Field(0.07, gt=0, description="of the contrastive loss")
    batch_size: int = Field(32, ge=2, description="images per batch")
    precision: Precision = Field(
        "fp32", description="of the passes; sums are in float64 either way"
    )
    seed: int = Field(0, ge=0, description="for `random`")

    @model_validator(mode="after")
    def _has_no_idle_setting(self) -> Selection:
        uses = {
            "gradient": ("loss", "views", "temperature", "batch_size", "precision"),
            "activation": ("batch_size", "precision"),
            "random": ("seed",),
        }.get(self.criterion, ())
        used = {"criterion", "level", *uses} - (
            {"temperature"} if self.loss == "cross_entropy" else set()
        )
        idle = [
            name
            for name, field in type(self).model_fields.items()
            if name not in used and getattr(self, name) != field.default
        ]
        if idle:
            by = f"criterion {self.criterion}" + (
                f" with loss {self.loss}" if self.criterion == "gradient" else ""
            )
            raise ValueError(
                f"{', '.join(idle)} would change nothing: {by} does not use it; leave it out"
            )
        return self
