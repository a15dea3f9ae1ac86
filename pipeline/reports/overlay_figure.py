"""Images with their true and their predicted masks over them, a row per image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pipeline.kinds import IGNORED
from pipeline.utils.files import whole

OPACITY = 0.5
_SIDE_INCHES, _DOTS_PER_INCH = 3.0, 120

Overlay = tuple[str, np.ndarray, np.ndarray, np.ndarray]
"""A title, an image uint8 [H, W, 3], its mask and its predicted mask, uint8 [H, W]."""


def draw_overlays(overlays: Sequence[Overlay], classes: Sequence[str], path: Path) -> None:
    """Write a PNG of three columns: image, truth, prediction. Class 0 and ignored pixels are left
    uncoloured.

    Raises:
        StorageError: the file cannot be written.
    """
    colours_C3 = colours_of(len(classes))
    figure = Figure(figsize=(3 * _SIDE_INCHES, len(overlays) * _SIDE_INCHES), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(overlays), 3, squeeze=False)
    shown = set()
    for row, (title, image, mask, predicted) in zip(grid, overlays, strict=True):
        pictures = (
            image,
            overlaid(image, mask, colours_C3),
            overlaid(image, predicted, colours_C3),
        )
        headings = (title, "truth", "prediction")
        for axes, picture, heading in zip(row, pictures, headings, strict=True):
            axes.imshow(picture)
            axes.set_title(heading, fontsize=9)
            axes.set_axis_off()
        shown |= {*np.unique(mask).tolist(), *np.unique(predicted).tolist()}
    patches = [
        Patch(color=colours_C3[number] / 255, label=classes[number])
        for number in sorted(shown - {0, IGNORED})
    ]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=8)
    with whole(path) as scratch:
        figure.savefig(scratch, format="png", dpi=_DOTS_PER_INCH)


def colours_of(class_count: int) -> np.ndarray:
    """A colour per class, [C, 3] of 0 to 255."""
    colours_C4 = colormaps["tab20"](np.arange(class_count) % 20)
    colours: np.ndarray = 255 * colours_C4[:, :3]
    return colours


def overlaid(image: np.ndarray, mask: np.ndarray, colours_C3: np.ndarray) -> np.ndarray:
    """The image with every pixel of a class but 0 mixed with the colour of its class."""
    is_coloured = (mask != 0) & (mask != IGNORED)
    mixed = image.astype(np.float64)
    mixed[is_coloured] *= 1 - OPACITY
    mixed[is_coloured] += OPACITY * colours_C3[mask[is_coloured]]
    return mixed.round().astype(np.uint8)
