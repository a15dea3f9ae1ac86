"""Images: squares of RGB bytes, scaled to [0, 1] and normalised by channel."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from pipeline.data.augment import augment_with
from pipeline.data.decode import decode_image, decode_images, decode_sized
from pipeline.data.formats import EXPECTED, IMAGE_EXTENSIONS
from pipeline.data.modality import Modality
from pipeline.errors import DataError
from pipeline.specs import Augmentation

_CHECK_SIZE_PX = 8
_EXAMPLE_PX = 16


@dataclass(frozen=True)
class Images(Modality):
    """Images uint8 [3, S, S], resized to S = `size_px`; `mean` and `std` of pixels in [0, 1]."""

    name: ClassVar[str] = "images"
    noun: ClassVar[str] = "image"
    a_noun: ClassVar[str] = "an image"
    extensions: ClassVar[tuple[str, ...]] = IMAGE_EXTENSIONS
    expected: ClassVar[str] = EXPECTED
    column: ClassVar[str] = "image"
    arrays: ClassVar[str] = "a uint8 array [N, H, W, 3]"
    example_file: ClassVar[str] = "image.jpg"

    size_px: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return 3, self.size_px, self.size_px

    @property
    def dtype(self) -> np.dtype[Any]:
        """Bytes."""
        return np.dtype(np.uint8)

    @staticmethod
    def stored(content: bytes, name: str) -> bytes:
        """The file as it is."""
        decode_image(content, _CHECK_SIZE_PX, name)
        return content

    @staticmethod
    def is_batch(array: np.ndarray) -> bool:
        """Whether it is uint8 [N, H, W, 3]."""
        return array.ndim == 4 and array.dtype == np.uint8 and array.shape[-1] == 3

    @staticmethod
    def example() -> bytes:
        """A grey ramp, as PNG."""
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((_EXAMPLE_PX, _EXAMPLE_PX)).save(buffer, "PNG")
        return buffer.getvalue()

    def decode_stored(self, content: bytes, name: str) -> np.ndarray:
        """See `decode_image`."""
        return decode_image(content, self.size_px, name)

    def decode_into(self, samples: np.ndarray, stored: Iterable[tuple[str, bytes]]) -> None:
        """See `decode_images`."""
        decode_images(samples, stored)

    def decode(self, source: Any, name: str = "") -> np.ndarray:
        """See `decode_image`; arrays are uint8 [H, W, 3]."""
        return decode_image(as_picture(source, name), self.size_px, name)

    def decode_sized(self, source: Any, name: str = "") -> tuple[np.ndarray, tuple[int, int]]:
        """What `decode` gives, and the image's own height and width."""
        return decode_sized(as_picture(source, name), self.size_px, name)

    @property
    def key(self) -> str:
        """The size."""
        return str(self.size_px)

    def normaliser(self) -> nn.Module:
        """See `ChannelNorm`."""
        return ChannelNorm(self.mean, self.std)

    def augment(
        self,
        samples: torch.Tensor,
        targets: torch.Tensor,
        generator: torch.Generator,
        flip: bool,
        kind: Augmentation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `augment_with`."""
        return augment_with(samples, targets, generator, flip, kind)

    def probe(self, count: int) -> np.ndarray:
        """Noise, uint8 [count, 3, S, S]."""
        return np.random.default_rng(0).integers(0, 256, (count, *self.shape), dtype=np.uint8)

    def facts(self) -> dict[str, Any]:
        """Size, mean, deviation and interpolation."""
        return {
            "size_px": self.size_px,
            "mean": self.mean,
            "std": self.std,
            "interpolation": "bicubic",
        }

    @property
    def identity(self) -> list[Any]:
        """Size, mean and deviation."""
        return [self.size_px, self.mean, self.std]

    def misfit(self, facts: dict[str, Any]) -> str | None:
        """Another size."""
        if facts.get("size_px") == self.size_px:
            return None
        return f"takes {facts.get('size_px')} px images, given a backbone set to {self.size_px}"


def as_picture(source: Any, name: str) -> Any:
    """An array as a Pillow image, anything else as it is. Raises DataError naming `name`."""
    if not isinstance(source, np.ndarray):
        return source
    try:
        return Image.fromarray(source)
    except (TypeError, ValueError):
        raise DataError(
            f"{name}: given an array of {source.dtype} {list(source.shape)}; expected uint8 [H, W,"
            " 3]"
        ) from None


class ChannelNorm(nn.Module):
    """Scales uint8 images [B, 3, S, S] to [0, 1], then shifts and scales each channel."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean) / self.std
