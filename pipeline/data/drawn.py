"""Synthetic tasks drawn by a seeded generator, for demonstrations and tests without a download.

`counting` asks how many blobs there are (1-6), `orientation` at which of 8 angles a bar or grating
lies: small relatives of VTAB's Clevr-Count and dSprites-Orientation (arXiv 1910.04867). Colour,
size, position and texture are independent of the label. Each image is a function of (seed, split,
number) alone, so images can be drawn one at a time and in any order.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from pipeline.data.index import SplitName
from pipeline.data.sources import Source, SourceSample, encode_png
from pipeline.specs import DrawnData

COUNTS = 6
ANGLES = 8
_GRID_CELLS = 3  # blobs lie in the cells of a 3 x 3 grid, so they never touch


def drawn_source(data: DrawnData) -> Source:
    """The samples of a drawn task; classes are balanced to within one sample."""
    classes = (
        [str(count + 1) for count in range(COUNTS)]
        if data.kind == "counting"
        else [f"{180 * k / ANGLES:g}" for k in range(ANGLES)]
    )
    sizes: dict[SplitName, int] = {"train": data.train_samples, "test": data.test_samples}

    def sample(split: SplitName, number: int) -> SourceSample:
        label = number % len(classes)
        return SourceSample(
            f"{data.kind} {split} {number}", "", label, partial(_encode, data, split, number, label)
        )

    return Source(
        classes,
        {split: [sample(split, number) for number in range(size)] for split, size in sizes.items()},
    )


def _encode(data: DrawnData, split: SplitName, number: int, label: int) -> bytes:
    rng = np.random.default_rng([data.seed, 0 if split == "train" else 1, number])
    draw = draw_counting if data.kind == "counting" else draw_orientation
    return encode_png(draw(label, data.size_px, rng))


def draw_counting(label: int, size_px: int, rng: np.random.Generator) -> np.ndarray:
    """`label + 1` blobs on a textured background, uint8 [S, S, 3]."""
    base, y, x = rng.uniform(70, 185, 3), *coordinates(size_px)
    image = (
        base
        + texture(y, x, rng)[..., None] * rng.uniform(8, 20)
        + rng.normal(0, 5, (size_px, size_px, 3))
    )
    cell = 1 / _GRID_CELLS
    for place in rng.choice(_GRID_CELLS**2, label + 1, replace=False):
        radius = rng.uniform(0.18, 0.42) * cell
        slack = cell / 2 - radius
        centre_y, centre_x = (np.array(divmod(place, _GRID_CELLS)) + 0.5) * cell + rng.uniform(
            -slack, slack, 2
        )
        coverage = soft_edge(radius - np.hypot(y - centre_y, x - centre_x), size_px)[..., None]
        image = image * (1 - coverage) + contrasting(base, rng) * coverage
    return to_bytes(image)


def draw_orientation(label: int, size_px: int, rng: np.random.Generator) -> np.ndarray:
    """A bar or a windowed grating along `label` * 22.5 degrees, anticlockwise from the horizontal,
    uint8 [S, S, 3].
    """
    base, y, x = rng.uniform(70, 185, 3), *coordinates(size_px)
    angle = np.pi * label / ANGLES
    centre_y, centre_x = rng.uniform(0.38, 0.62, 2)
    along = (x - centre_x) * np.cos(angle) - (y - centre_y) * np.sin(angle)
    across = (x - centre_x) * np.sin(angle) + (y - centre_y) * np.cos(angle)
    if rng.random() < 0.5:
        length, width = rng.uniform(0.5, 0.75), rng.uniform(0.08, 0.16)
        coverage = soft_edge(
            np.minimum(length / 2 - np.abs(along), width / 2 - np.abs(across)), size_px
        )
    else:
        window = np.exp(-(along**2 + across**2) / (2 * rng.uniform(0.16, 0.24) ** 2))
        coverage = window * (
            0.5
            + 0.5 * np.cos(2 * np.pi * across / rng.uniform(0.18, 0.3) + rng.uniform(0, 2 * np.pi))
        )
    image = (
        base
        + (contrasting(base, rng) - base) * coverage[..., None]
        + rng.normal(0, rng.uniform(6, 18), (size_px, size_px, 3))
    )
    return to_bytes(image)


def coordinates(size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in [0, 1], rows and columns, each [S, S]."""
    centres = (np.arange(size_px) + 0.5) / size_px
    y, x = np.meshgrid(centres, centres, indexing="ij")
    return y, x


def texture(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two crossing waves in [-1, 1], [S, S]."""
    frequencies, phases = rng.uniform(-4, 4, (2, 2)), rng.uniform(0, 2 * np.pi, 2)
    waves = [
        np.sin(2 * np.pi * (fy * y + fx * x) + phase)
        for (fy, fx), phase in zip(frequencies, phases, strict=True)
    ]
    return (waves[0] + waves[1]) / 2


def soft_edge(inside: np.ndarray, size_px: int) -> np.ndarray:
    """Coverage in [0, 1] from the distance inside an edge, which is one pixel wide."""
    return np.clip(inside * size_px + 0.5, 0, 1)


def contrasting(base: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour that differs from `base` by 60-120 of 255 in each channel."""
    return np.clip(base + rng.choice([-1, 1], 3) * rng.uniform(60, 120, 3), 0, 255)


def to_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
