"""Drawn solids: point clouds without a download, for demonstrations and tests.

Points lie on the surface of a sphere, box, cylinder, cone, torus or pyramid. Proportions, heading,
a lean of up to 20 degrees, noise, and the side that the scanner does not see are independent of
the solid. As in `drawn.py`, a cloud is a function of (seed, split, number).
"""

from __future__ import annotations

import io
from functools import partial

import numpy as np

from pipeline.data.index import SplitName
from pipeline.data.sources import Source, SourceSample
from pipeline.specs import DrawnData

SOLIDS = ("box", "cone", "cylinder", "pyramid", "sphere", "torus")
_POINTS = 1400
_SEEN = (0.6, 1.0)
_NOISE = (0.0, 0.04)
_LEAN = np.pi / 9


def solids_source(data: DrawnData) -> Source:
    """The samples of a task of drawn solids; classes are balanced to within one sample."""
    sizes: dict[SplitName, int] = {"train": data.train_samples, "test": data.test_samples}

    def sample(split: SplitName, number: int) -> SourceSample:
        label = number % len(SOLIDS)
        return SourceSample(
            f"solids {split} {number}", "", label, partial(_encode, data, split, number, label)
        )

    return Source(
        list(SOLIDS),
        {split: [sample(split, number) for number in range(size)] for split, size in sizes.items()},
    )


def _encode(data: DrawnData, split: SplitName, number: int, label: int) -> bytes:
    rng = np.random.default_rng([data.seed, 0 if split == "train" else 1, number])
    stream = io.BytesIO()
    np.save(stream, draw_solid(SOLIDS[label], rng).astype(np.float32), allow_pickle=False)
    return stream.getvalue()


def draw_solid(solid: str, rng: np.random.Generator) -> np.ndarray:
    """Points on a solid's surface as a scanner sees them, float64 [N, 3], z up."""
    points = _surface(solid, rng) * rng.uniform(0.6, 1.4, 3)
    heading, lean = rng.uniform(0, 2 * np.pi), rng.uniform(0, _LEAN)
    points = points @ _turn(lean, 1, 2) @ _turn(heading, 0, 1)
    view = rng.normal(size=3)
    seen = int(rng.uniform(*_SEEN) * len(points))
    points = points[np.argsort(points @ view)[-seen:]]
    return points + rng.normal(0, rng.uniform(*_NOISE), points.shape)


def _turn(angle: float, one: int, other: int) -> np.ndarray:
    matrix = np.eye(3)
    matrix[[one, one, other, other], [one, other, one, other]] = (
        np.cos(angle),
        np.sin(angle),
        -np.sin(angle),
        np.cos(angle),
    )
    return matrix


def _surface(solid: str, rng: np.random.Generator) -> np.ndarray:
    """Points on a solid of about unit size, [N, 3]."""
    angle, share = rng.uniform(0, 2 * np.pi, _POINTS), rng.random(_POINTS)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if solid == "sphere":
        normal = rng.normal(size=(_POINTS, 3))
        sphere: np.ndarray = normal / np.linalg.norm(normal, axis=1, keepdims=True)
        return sphere
    if solid == "torus":
        inner, tube = rng.uniform(0.25, 0.45), rng.uniform(0, 2 * np.pi, _POINTS)
        flat = ring * (1 + inner * np.cos(tube))[:, None]
        return np.column_stack([flat, inner * np.sin(tube)])
    if solid in ("box", "pyramid"):
        ring = ring / np.abs(ring).max(axis=1, keepdims=True)
    is_base = rng.random(_POINTS) < 1 / 3
    if solid in ("cone", "pyramid"):
        side = np.column_stack([ring * np.sqrt(share)[:, None], 1 - 2 * np.sqrt(share)])
        return np.where(is_base[:, None], _disc(ring, share, -1.0), side)
    lid = np.where(rng.random(_POINTS) < 0.5, 1.0, -1.0)
    side = np.column_stack([ring, 2 * share - 1])
    return np.where(is_base[:, None], _disc(ring, share, lid), side)


def _disc(ring: np.ndarray, share: np.ndarray, height: float | np.ndarray) -> np.ndarray:
    """Points inside a ring, at a height."""
    return np.column_stack([ring * np.sqrt(share)[:, None], np.broadcast_to(height, len(ring))])
