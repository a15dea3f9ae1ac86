"""Point clouds from two sides with what is predicted of them, a row per cloud."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.utils.files import whole

VIEWS = (("x", "z"), ("x", "y"))
"""The axes of each view, to the right and upwards: from the front and from above where z is up."""
_SIDE_INCHES, _DOTS_PER_INCH = 3.0, 120
_POINT_AREA = 4.0

DrawnCloud = tuple[str, np.ndarray]
"""A title, and a cloud [N, 3 or more], of which the first three columns are drawn."""


def draw_clouds(clouds: Sequence[DrawnCloud], path: Path) -> None:
    """Write a PNG with two views of each cloud; points are coloured by their distance from the
    viewer.

    Raises:
        StorageError: the file cannot be written.
    """
    size = (len(VIEWS) * _SIDE_INCHES, len(clouds) * _SIDE_INCHES)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(clouds), len(VIEWS), squeeze=False)
    for row, (title, cloud) in zip(grid, clouds, strict=True):
        for axes, (right, up) in zip(row, VIEWS, strict=True):
            across, upwards, depth = ("xyz".index(axis) for axis in (right, up, _third(right, up)))
            axes.scatter(
                cloud[:, across],
                cloud[:, upwards],
                c=cloud[:, depth],
                s=_POINT_AREA,
                cmap="viridis",
            )
            axes.set_aspect("equal", adjustable="datalim")
            axes.set_xlabel(right, fontsize=8)
            axes.set_ylabel(up, fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_title(title, fontsize=9, loc="left")
    with whole(path) as scratch:
        figure.savefig(scratch, format="png", dpi=_DOTS_PER_INCH)


def _third(one: str, other: str) -> str:
    return next(axis for axis in "xyz" if axis not in (one, other))
