"""Overlays of masks: their colours, and the figure as a file."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.kinds import IGNORED
from pipeline.reports.overlay_figure import colours_of, draw_overlays, overlaid


def test_classes_are_coloured_but_the_first_and_ignored_pixels_are_not() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    mask = np.array([[0, 1], [IGNORED, 2]], np.uint8)
    colours = np.array([[0, 0, 0], [200, 0, 50], [0, 255, 255]], float)
    shown = overlaid(image, mask, colours)
    assert shown[0, 0].tolist() == shown[1, 0].tolist() == [100, 100, 100]
    assert shown[0, 1].tolist() == [150, 50, 75]
    assert shown[1, 1].tolist() == [50, 178, 178]
    assert (image == 100).all(), "the image itself stays as it is"


def test_there_are_more_classes_than_colours() -> None:
    colours = colours_of(45)
    assert colours.shape == (45, 3)
    assert 0 <= colours.min() < colours.max() <= 255


def test_a_row_per_image_is_drawn_whatever_its_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    overlays = [
        (
            name,
            rng.integers(0, 256, (*size, 3), np.uint8),
            rng.integers(0, 3, size, np.uint8),
            np.zeros(size, np.uint8),
        )
        for name, size in (("best", (20, 30)), ("worst", (40, 25)))
    ]
    draw_overlays(overlays, ["nothing", "disc", "square"], tmp_path / "masks.png")
    with Image.open(tmp_path / "masks.png") as figure:
        assert figure.format == "PNG"
        assert figure.size == (1080, 720)
