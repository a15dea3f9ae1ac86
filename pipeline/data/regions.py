"""Regions of an image as COCO writes them, polygons and run lengths, as bool masks [H, W].

A pixel belongs to a polygon if its centre does, by the even-odd rule; the pixel in row 0 and column
0 has its centre at (0.5, 0.5). A region of several polygons is their union. Run lengths count
pixels column by column, from the top left one, outside and inside the region in turn.

In compressed form, each run is a difference to the run two before, from the fourth run on. A number
is written as digits of 5 bits, the lowest first: the character 48 + digit, plus 32 if another digit
follows. Bit 16 of the last digit is the sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_FIRST, _MORE, _DIGIT, _SIGN = 48, 32, 31, 16
_DIGITS_MAX = 7
"""A count of up to 2^31 has no more digits."""


def polygons_mask(polygons: Sequence[Any], height: int, width: int) -> np.ndarray:
    """The union of polygons `[x1, y1, x2, y2, ...]` in pixels. Raises ValueError."""
    mask = np.zeros((height, width), bool)
    for number, polygon in enumerate(polygons, start=1):
        mask |= _polygon_mask(_points(polygon, f"polygon {number}"), height, width)
    return mask


def _points(polygon: Any, what: str) -> np.ndarray:
    """The corners of a polygon, float64 [N, 2]."""
    is_list = isinstance(polygon, list) and all(type(each) in (int, float) for each in polygon)
    if not is_list or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"{what} is no list of x and y of at least three points")
    points = np.array(polygon, np.float64).reshape(-1, 2)
    if not np.isfinite(points).all():
        raise ValueError(f"{what} has a coordinate that is not finite")
    return points


def _polygon_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """A row of pixel centres is inside between its first and second crossing with an edge, between
    the third and fourth, and so on.
    """
    (x, y), (x_next, y_next) = points.T, np.roll(points, -1, axis=0).T
    centres = np.arange(height) + 0.5
    edges, rows = np.nonzero((y[:, None] <= centres) != (y_next[:, None] <= centres))
    share = (centres[rows] - y[edges]) / (y_next - y)[edges]
    crossings = x[edges] + share * (x_next - x)[edges]
    turns = np.zeros((height, width + 1), np.int64)
    np.add.at(turns, (rows, np.clip(np.ceil(crossings - 0.5), 0, width).astype(np.int64)), 1)
    return turns.cumsum(axis=1)[:, :width] % 2 == 1


def runs_mask(content: dict[str, Any], height: int, width: int) -> np.ndarray:
    """The region of run lengths, `{"size": [H, W], "counts": ...}`. Raises ValueError."""
    size, counts = content.get("size"), content.get("counts")
    if size != [height, width]:
        raise ValueError(f"its size is {size}; the image has {[height, width]}")
    runs = _decompressed(counts) if isinstance(counts, str) else _run_list(counts)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(
            f"its runs cover {runs.sum()} pixels; the image has {height} x {width} ="
            f" {height * width}"
        )
    is_inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_inside, runs).reshape(width, height).T


def _run_list(counts: Any) -> np.ndarray:
    is_list = isinstance(counts, list) and all(type(each) is int for each in counts)
    if not is_list or not all(0 <= each < 1 << 31 for each in counts):
        raise ValueError("its counts are neither whole numbers from 0 nor a text")
    return np.array(counts, np.int64)


def _decompressed(counts: str) -> np.ndarray:
    """The runs of compressed counts, int64."""
    characters = np.frombuffer(counts.encode("utf-8"), np.uint8).astype(np.int64) - _FIRST
    if not len(characters) or (characters < 0).any() or (characters > _MORE + _DIGIT).any():
        raise ValueError("its counts hold characters that no compressed run lengths have")
    is_last = characters & _MORE == 0
    if not is_last[-1]:
        raise ValueError("its counts end within a number")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > _DIGITS_MAX:
        raise ValueError("its counts hold a number that is too large")
    place = np.arange(len(characters)) - np.repeat(starts, digits)
    numbers = np.add.reduceat((characters & _DIGIT) << (5 * place), starts)
    numbers -= np.where(characters[ends] & _SIGN, 1 << (5 * digits), 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers
