"""What predictions are asked of: samples as users give them, and as a network takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.images import Images
from pipeline.data.modality import Modality

Sample = Path | str | bytes | Image.Image | np.ndarray


@dataclass(frozen=True, eq=False)
class Decoded:
    """A sample as a network takes it; of an image also its own height and width."""

    array: np.ndarray
    size: tuple[int, int] = (0, 0)


def decoded(sample: Sample, number: int, takes: Modality, noun: str | None = None) -> Decoded:
    """The sample as a network `takes` it; errors call one without a path `noun` and its number.
    Raises DataError.
    """
    name = "" if isinstance(sample, Path | str) else f"{noun or takes.noun} {number}"
    if isinstance(takes, Images):
        return Decoded(*takes.decode_sized(sample, name))
    return Decoded(takes.decode(sample, name))
