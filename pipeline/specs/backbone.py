"""The backbone that a task adapts."""

from __future__ import annotations

from pydantic import (
    Field,
)

from pipeline.specs.section import Channels, Deviations, Spec


class Backbone(Spec):
    """A timm model and its weights."""

    model: str = Field(
        description=(
            "name of a timm model, or one that timm saved: `local-dir:FOLDER` or"
            " `hf-hub:OWNER/NAME`"
        )
    )
    arguments: dict[str, int | float | str | bool | list[int]] = Field(
        default_factory=dict, description="arguments of `timm.create_model`"
    )
    weights: str = Field(
        "pretrained",
        description=(
            "`pretrained`, `random` (seeded; for tests), or the path of a safetensors checkpoint or"
            " of a folder with one"
        ),
    )
    mean: Channels | None = Field(
        None, description="per channel, of pixels in [0, 1]; default: timm's for this model"
    )
    std: Deviations | None = Field(
        None, description="per channel, of pixels in [0, 1]; default: timm's for this model"
    )
