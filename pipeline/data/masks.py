"""Masks of class numbers: read from what people have, and kept as one kind of PNG.

Whatever a mask was, it is kept as a grey PNG of class numbers, with 255 where pixels are ignored.
A mask that says anything else than its task file does is refused: a value without a class would
otherwise be learnt as some other class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from pipeline.data.decode import open_image
from pipeline.data.formats import extension_of
from pipeline.data.quoting import listing
from pipeline.data.sources import encode_png
from pipeline.errors import DataError
from pipeline.kinds import IGNORED
from pipeline.specs import MasksData

_GREY_MODES = ("L", "1", "P", "I;16", "I;16B", "I;16L", "I")
"""Pillow's modes with one number per pixel; those of a palette are the colours' numbers."""


def mask_png(
    content: bytes, image: bytes, data: MasksData, classes: Sequence[str], name: str
) -> bytes:
    """A mask as it is kept, from the file's content and its image's. Raises DataError."""
    opened = open_image(content, name)
    _check_size(opened, image, name)
    if data.threshold is not None:
        return encode_png((_grey(opened, name) > data.threshold).astype(np.uint8))
    if extension_of(content) == "jpg":
        raise DataError(
            f"{name}: a JPEG, whose values are not exact; expected a PNG of class numbers, or"
            " `threshold: 127` for a mask in black and white"
        )
    if data.palette is not None:
        return encode_png(_of_colours(opened, data.palette, classes, name))
    numbers = _numbers(opened, name)
    is_ignored = numbers == data.ignore if data.ignore is not None else np.zeros_like(numbers, bool)
    _check_known(numbers[~is_ignored], len(classes), name)
    return encode_png(np.where(is_ignored, IGNORED, numbers).astype(np.uint8))


def check_kept(png: bytes, image: bytes, class_count: int | None, name: str) -> None:
    """Check a mask that others wrote as it would be kept. Raises DataError.

    Args:
        class_count: None where any number of a byte but 255 may be a class.
    """
    opened = open_image(png, name)
    _check_size(opened, image, name)
    numbers = _numbers(opened, name)
    _check_known(numbers[numbers != IGNORED], class_count or IGNORED, name)


def kept_classes(png: bytes, name: str) -> list[int]:
    """The classes that occur in a mask as it is kept, in ascending order."""
    numbers = np.unique(_numbers(open_image(png, name), name))
    return [int(number) for number in numbers if number != IGNORED]


def whole_mask(png: bytes, name: str) -> np.ndarray:
    """Decode a mask in its own size, uint8 [H, W]."""
    return _numbers(open_image(png, name), name).astype(np.uint8)


def decode_mask(png: bytes, size_px: int, name: str) -> np.ndarray:
    """A kept mask resized to a square by nearest neighbour, uint8 [size_px, size_px]."""
    mask = Image.fromarray(_numbers(open_image(png, name), name).astype(np.uint8))
    return np.asarray(mask.resize((size_px, size_px), Image.Resampling.NEAREST))


def _check_size(mask: Image.Image, image: bytes, name: str) -> None:
    """Raise DataError unless a mask is as large as its image."""
    size = open_image(image, name).size
    if mask.size != size:
        raise DataError(
            f"{name}: {_by(mask.size)} px, but its image has {_by(size)}; expected a mask of the"
            " same size"
        )


def _check_known(counted: np.ndarray, class_count: int, name: str) -> None:
    """Raise DataError unless there are values, and all of them are classes."""
    if not counted.size:
        raise DataError(f"{name}: every pixel is ignored; remove it with its image")
    unknown = np.unique(counted[counted >= class_count])
    if len(unknown):
        raise DataError(
            f"{name}: the values {listing([str(value) for value in unknown])} are no classes;"
            f" expected 0 to {class_count - 1}; a value that is not counted is named in `ignore`,"
            " and a mask in black and white takes `threshold: 127`"
        )


def _of_colours(
    mask: Image.Image, palette: Mapping[str, str | None], classes: Sequence[str], name: str
) -> np.ndarray:
    """The class of each pixel's colour, uint8 [H, W]."""
    number = {each: k for k, each in enumerate(classes)}
    class_of = {
        int(colour[1:], 16): IGNORED if each is None else number[each]
        for colour, each in palette.items()
    }
    colours = np.asarray(mask.convert("RGB")).astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    found, place = np.unique(colours, return_inverse=True)
    unknown = [f"#{colour:06x}" for colour in found.tolist() if colour not in class_of]
    if unknown:
        raise DataError(
            f"{name}: the colours {listing(unknown)} are not in `palette`; add them, with null if"
            " they are not counted"
        )
    numbers = np.array([class_of[colour] for colour in found.tolist()], np.uint8)[place]
    _check_known(numbers[numbers != IGNORED], len(classes), name)
    return numbers.reshape(colours.shape)


def _numbers(mask: Image.Image, name: str) -> np.ndarray:
    """One number per pixel, int64 [H, W]."""
    if mask.mode not in _GREY_MODES:
        raise DataError(
            f"{name}: pixels of mode {mask.mode}; expected one class number per pixel; save it as a"
            " grey or palette PNG"
        )
    return np.asarray(mask).astype(np.int64)


def _grey(mask: Image.Image, name: str) -> np.ndarray:
    """Grey values from 0 to 255, uint8 [H, W]."""
    if mask.mode.startswith("I") or mask.mode == "F":
        raise DataError(
            f"{name}: grey values of more than 8 bits; `threshold` is one of 0 to 255; save it with"
            " 8 bits"
        )
    return np.asarray(mask.convert("RGB").convert("L"))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
