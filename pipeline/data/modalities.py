"""The modalities by name."""

from __future__ import annotations

from pipeline.data.images import Images
from pipeline.data.modality import Modality
from pipeline.data.points import Points

MODALITIES: dict[str, type[Modality]] = {each.name: each for each in (Images, Points)}
