"""Point clouds from two sides with what is predicted of them, a row per cloud."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.utils.files import whole

_SIDE_INCHES, _DOTS_PER_INCH = 3.0, 120
_POINT_AREA = 4.0

DrawnCloud = tuple[str, np.ndarray]
"""A title, and a cloud [N, 3 or more], of which the first three columns are drawn."""


def draw_clouds(clouds: Sequence[DrawnCloud], path: Path, up: str = "z") -> None:
    """Write a PNG with each cloud from the front and from above, where the axis `up` is vertical.
    Nearer points are darker, and hide those behind them.

    Raises:
        StorageError: the file cannot be written.
    """
    size = (2 * _SIDE_INCHES, len(clouds) * _SIDE_INCHES)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    vertical = "xyz".index(up)
    right, back = (vertical + 1) % 3, (vertical + 2) % 3
    for row, (title, cloud) in zip(
        figure.subplots(len(clouds), 2, squeeze=False), clouds, strict=True
    ):
        _draw_view(row[0], cloud, right, vertical, cloud[:, back])
        _draw_view(row[1], cloud, right, back, -cloud[:, vertical])
        row[0].set_title(title, fontsize=9, loc="left")
        row[1].set_title("from above", fontsize=8, loc="right", color="gray")
    with whole(path) as scratch:
        figure.savefig(scratch, format="png", dpi=_DOTS_PER_INCH)


def _draw_view(
    axes: Axes, cloud: np.ndarray, right: int, upwards: int, distance: np.ndarray
) -> None:
    far_first = cloud[np.argsort(-distance, kind="stable")]
    axes.scatter(
        far_first[:, right],
        far_first[:, upwards],
        c=np.sort(distance)[::-1],
        s=_POINT_AREA,
        cmap="viridis",
    )
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("xyz"[right], fontsize=8)
    axes.set_ylabel("xyz"[upwards], fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
