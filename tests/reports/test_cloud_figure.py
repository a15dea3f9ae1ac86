"""Point clouds drawn from two sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.reports.cloud_figure import draw_clouds


def test_every_cloud_has_a_row_of_two_views(tmp_path: Path) -> None:
    clouds = np.random.default_rng(0).normal(size=(3, 50, 6)).astype(np.float32)
    titles = ("best: box", "median: torus", "worst: cone")
    drawn = list(zip(titles, clouds, strict=True))
    draw_clouds(drawn, tmp_path / "clouds.png")
    with Image.open(tmp_path / "clouds.png") as figure:
        assert figure.format == "PNG"
        assert figure.size == (720, 1080)
    first = (tmp_path / "clouds.png").read_bytes()
    draw_clouds(drawn, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == first


def coloured(cloud: np.ndarray, path: Path, up: str = "z") -> list[np.ndarray]:
    """Where the front and the view from above have points, and how bright these are: HSV's value
    where the saturation is high, else NaN.
    """
    draw_clouds([("cloud", cloud)], path, up)
    with Image.open(path) as figure:
        hsv = np.asarray(figure.convert("HSV")).astype(float)
    return np.hsplit(np.where(hsv[..., 1] > 60, hsv[..., 2], np.nan), 2)


@pytest.mark.parametrize("up", ["x", "y", "z"])
def test_a_view_shows_what_it_is_from(tmp_path: Path, up: str) -> None:
    """A line away from the viewer is a point from the front and a vertical line from above."""
    line = np.zeros((50, 3))
    line[:, ("xyz".index(up) + 2) % 3] = np.linspace(-1, 1, 50)
    front, above = (np.isfinite(view) for view in coloured(line, tmp_path / "line.png", up))
    assert np.ptp(np.flatnonzero(front.any(axis=1))) < 20 < 150
    assert np.ptp(np.flatnonzero(above.any(axis=1))) > 150


def test_near_points_are_dark_and_hide_the_far_ones(tmp_path: Path) -> None:
    """The first two points are at one place of the front view, the others at its corners."""
    cloud = np.array([[0.0, -1, 0], [0, 1, 0], [1, 0, 1], [-1, 0, -1]])
    front = coloured(cloud, tmp_path / "cloud.png")[0]
    assert np.nanmedian(front[150:210, 150:210]) < np.nanmedian(front)
    draw_clouds([("cloud", cloud[::-1])], tmp_path / "reversed.png")
    assert (tmp_path / "reversed.png").read_bytes() == (tmp_path / "cloud.png").read_bytes()
