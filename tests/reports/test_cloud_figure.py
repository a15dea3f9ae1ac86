"""Point clouds drawn from two sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.reports.cloud_figure import draw_clouds


def test_every_cloud_has_a_row_of_two_views(tmp_path: Path) -> None:
    clouds = np.random.default_rng(0).normal(size=(3, 50, 6)).astype(np.float32)
    titles = ("best: box; is box", "median: torus; is torus", "worst: cone; is box")
    drawn = list(zip(titles, clouds, strict=True))
    draw_clouds(drawn, tmp_path / "clouds.png")
    with Image.open(tmp_path / "clouds.png") as figure:
        assert figure.format == "PNG"
        assert figure.size == (720, 1080)
    first = (tmp_path / "clouds.png").read_bytes()
    draw_clouds(drawn, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == first


def test_a_view_shows_what_it_is_from(tmp_path: Path) -> None:
    """A line along y is a point from the front and a line from above."""
    line = np.zeros((50, 3))
    line[:, 1] = np.linspace(-1, 1, 50)
    draw_clouds([("line", line)], tmp_path / "line.png")
    with Image.open(tmp_path / "line.png") as figure:
        saturation = np.asarray(figure.convert("HSV"))[..., 1]
    front, above = np.hsplit(saturation > 60, 2)
    assert np.ptp(np.flatnonzero(front.any(axis=1))) < 20 < 150
    assert np.ptp(np.flatnonzero(above.any(axis=1))) > 150
