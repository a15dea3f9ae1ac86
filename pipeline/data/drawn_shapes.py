"""Drawn shapes with their masks: segmentation without a download, for demonstrations and tests.

Each image has one to three discs, squares and triangles on a textured background. Colour, size and
place are independent of the shape. As in `drawn.py`, an image is a function of (seed, split,
number); where shapes overlap, the later one hides the earlier.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from pipeline.data.drawn import contrasting, coordinates, soft_edge, texture, to_bytes
from pipeline.data.index import SplitName
from pipeline.data.sources import Source, SourceSample, encode_png
from pipeline.specs import DrawnData

SHAPES = ("background", "disc", "square", "triangle")
_MOST_SHAPES = 3


def shapes_source(data: DrawnData) -> Source:
    """The samples of a task of drawn shapes."""
    sizes: dict[SplitName, int] = {"train": data.train_samples, "test": data.test_samples}

    def sample(split: SplitName, number: int) -> SourceSample:
        drawn = partial(_draw, data, split, number)
        return SourceSample(
            f"shapes {split} {number}",
            "",
            (),
            lambda: encode_png(drawn()[0]),
            lambda image: encode_png(drawn()[1]),
        )

    return Source(
        list(SHAPES),
        {split: [sample(split, number) for number in range(size)] for split, size in sizes.items()},
    )


def _draw(data: DrawnData, split: SplitName, number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([data.seed, 0 if split == "train" else 1, number])
    return draw_shapes(data.size_px, rng)


def draw_shapes(size_px: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [S, S, 3], and its mask of class numbers, uint8 [S, S]."""
    base, y, x = rng.uniform(70, 185, 3), *coordinates(size_px)
    image = (
        base
        + texture(y, x, rng)[..., None] * rng.uniform(8, 20)
        + rng.normal(0, 5, (size_px, size_px, 3))
    )
    mask = np.zeros((size_px, size_px), np.uint8)
    for shape in rng.integers(1, len(SHAPES), rng.integers(1, _MOST_SHAPES + 1)):
        radius = rng.uniform(0.12, 0.25)
        centre_y, centre_x = rng.uniform(radius, 1 - radius, 2)
        inside = _inside(SHAPES[shape], y - centre_y, x - centre_x, radius)
        coverage = soft_edge(inside, size_px)[..., None]
        image = image * (1 - coverage) + contrasting(base, rng) * coverage
        mask[inside > 0] = shape
    return to_bytes(image), mask


def _inside(shape: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """The distance inside a shape's edge, negative outside, [S, S]; y points down."""
    if shape == "disc":
        return radius - np.hypot(y, x)
    if shape == "square":
        half = radius / np.sqrt(2)
        inside: np.ndarray = half - np.maximum(np.abs(y), np.abs(x))
        return inside
    slope = np.abs(x) * np.sqrt(3) / 2 - y / 2
    return np.minimum(radius / 2 - y, radius / 2 - slope)
