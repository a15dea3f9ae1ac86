"""Resizing images to squares: plain bicubic, antialiased, aspect not kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

_SMALL_PX = 96
"""A dozen such images still fit into a processor's cache."""


def resized(image: Image.Image, size_px: int) -> np.ndarray:
    """An RGB image as a square, uint8 [3, size_px, size_px]."""
    square = image.resize((size_px, size_px), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1)


def is_small(square: np.ndarray) -> bool:
    """Whether resizing to [3, size_px, size_px] takes so little that a call for several images is
    faster.
    """
    return square.shape[-1] <= _SMALL_PX


def can_join(image: Image.Image) -> bool:
    """Whether `resized_together` takes an image: it is small, and no taller than wide, since Pillow
    resizes the columns of some taller ones first.
    """
    return image.height <= image.width <= _SMALL_PX


def resized_together(images: Sequence[Image.Image], size_px: int) -> np.ndarray:
    """The same bytes as `resized` for each of N RGB images of one size that can join, uint8 [N, 3,
    size_px, size_px].

    Pillow resizes the rows of an image first and its columns next, so images on top of each other
    can share the first step, and images side by side the second.
    """
    height = images[0].height
    count = len(images)
    pixels = np.concatenate([np.asarray(image) for image in images])  # [N * height, width, 3]
    pixels = _resized(pixels, (size_px, count * height)).reshape(count, height, size_px, 3)
    pixels = pixels.transpose(1, 0, 2, 3).reshape(height, count * size_px, 3)
    pixels = _resized(pixels, (count * size_px, size_px)).reshape(size_px, count, size_px, 3)
    return pixels.transpose(1, 3, 0, 2)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
