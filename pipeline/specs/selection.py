"""How connections are selected."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    model_validator,
)

from pipeline.specs.section import Spec
from pipeline.specs.training import Augmentation

Level = Literal["neuron", "layer", "network"]
Criterion = Literal["gradient", "magnitude", "activation", "random"]


class Selection(Spec):
    """Which connections `top_k` keeps (GPS, arXiv 2312.10136): what makes one important, and which of them compete with each other.

    gradient: the loss's gradient, summed with its sign over the training set. magnitude: the weight. activation: the weight times its input's mean
    size, without a backward pass (FPS, arXiv 2510.27359). random: a number drawn by `seed`.
    """

    criterion: Criterion = "gradient"
    level: Level = "neuron"
    loss: Literal["contrastive", "cross_entropy"] = Field("contrastive", description="of two views, without a head; or of a head that is not trained")
    views: Augmentation = Field("strong", description="of each image, two; strong is what GPS draws")
    temperature: float = Field(0.07, gt=0, description="of the contrastive loss")
    batch_size: int = Field(32, ge=2)
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the passes; what they give is summed in float64 either way")
    seed: int = Field(0, ge=0, description="of criterion random")

    @model_validator(mode="after")
    def _has_no_idle_setting(self) -> Selection:
        uses = {
            "gradient": ("loss", "views", "temperature", "batch_size", "precision"),
            "activation": ("batch_size", "precision"),
            "random": ("seed",),
        }.get(self.criterion, ())
        used = {"criterion", "level", *uses} - ({"temperature"} if self.loss == "cross_entropy" else set())
        idle = [name for name, field in type(self).model_fields.items() if name not in used and getattr(self, name) != field.default]
        if idle:
            by = f"criterion {self.criterion}" + (f" with loss {self.loss}" if self.criterion == "gradient" else "")
            raise ValueError(f"{', '.join(idle)} would change nothing: {by} does not use it; leave it out")
        return self
