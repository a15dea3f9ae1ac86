"""Which backbone a task adapts."""

from __future__ import annotations

from pydantic import (
    Field,
)

from pipeline.specs.section import Channels, Deviations, Spec


class Backbone(Spec):
    """A timm model by name, or one that timm saved (`local-dir:FOLDER`, `hf-hub:OWNER/NAME`).

    `weights`: `pretrained` (its own), `random` (seeded; for tests), or the path of a safetensors checkpoint or of a folder with one.
    """

    model: str
    arguments: dict[str, int | float | str | bool | list[int]] = Field(default_factory=dict)
    weights: str = "pretrained"
    mean: Channels | None = None
    std: Deviations | None = None
