"""Decoding an image to a square of RGB bytes, for training and for prediction alike.

The resize is plain bicubic to a square, antialiased, aspect not kept. A JPEG of at least
four times the square's width and height is decoded at 1/2, 1/4 or 1/8 of its size, which is still
at least twice the square's. Only the formats of `formats.py` are opened, of an animation its first
frame. Pillow's limit on the number of pixels, its guard against decompression bombs, stays on.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.data.formats import EXPECTED, explain, extension_of, readable_formats
from pipeline.data.paths import read_path
from pipeline.data.resize import can_join, is_small, resized, resized_together
from pipeline.errors import DataError

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes an image upright, by its EXIF orientation."""
_TURNS_ON_SIDE = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))
_NO_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
"""The filter as Python keeps it: action, message, category, module, line."""
_SMALL_BYTES, _SMALL_PX = 4096, 256
"""Decoding a file of at most so many bytes, whose image has at most so many pixels a side, takes
less time than passing the GIL on to another thread.
"""
_ONE_AT_A_TIME = threading.Lock()


def decode_image(
    source: bytes | str | os.PathLike[str] | Image.Image, size_px: int, name: str = ""
) -> np.ndarray:
    """Decode `source` (encoded bytes, a file's path or a Pillow image) to uint8 [3, size_px,
    size_px].

    Grey, palette, CMYK and 16-bit grey images become RGB; EXIF orientation is applied if it can be
    read; transparency is dropped. Raises DataError, whose message names the image `name` (default:
    its path).
    """
    return decode_sized(source, size_px, name)[0]


def decode_sized(
    source: bytes | str | os.PathLike[str] | Image.Image, size_px: int, name: str = ""
) -> tuple[np.ndarray, tuple[int, int]]:
    """What `decode_image` gives, and the height and width that the upright image has itself."""
    name = name or (str(source) if isinstance(source, (str, os.PathLike)) else "image")
    content = _content(source, name) if isinstance(source, (str, os.PathLike)) else source
    with _named_faults(content, name):
        if isinstance(content, bytes):
            image, (width, height) = _open(content, 2 * size_px)
        else:
            image, (width, height) = content, content.size
        if _turn(image) in _TURNS_ON_SIDE:
            width, height = height, width
        square = resized(_to_rgb(_upright(image)), size_px)
    return np.ascontiguousarray(square), (height, width)


def decode_images(squares: np.ndarray, contents: Iterable[tuple[str, bytes]]) -> None:
    """Decode N images, given by name and content, as `decode_image` does, into `squares`, uint8 [N,
    3, size_px, size_px]. Only one large image is in memory at a time.

    Pillow releases the GIL for only microseconds while it decodes or resizes a small image, so
    several threads are slower than one. Therefore only one thread at a time decodes small files,
    and images of the same size are resized together.
    """
    size_px = squares.shape[-1]
    small: list[tuple[int, str, bytes]] = []
    for row, (name, content) in enumerate(contents):
        if len(content) <= _SMALL_BYTES and is_small(squares[row]):
            small.append((row, name, content))
        else:
            squares[row] = decode_image(content, size_px, name)
    with _ONE_AT_A_TIME:
        images = [_decode_if_small(content, size_px, name) for _, name, content in small]
    joining: dict[tuple[int, int], list[tuple[int, Image.Image]]] = defaultdict(list)
    for (row, name, content), image in zip(small, images, strict=True):
        if image is None:
            squares[row] = decode_image(content, size_px, name)
        elif can_join(image):
            joining[image.size].append((row, image))
        else:
            squares[row] = resized(image, size_px)
    for same in joining.values():
        rows, alike = zip(*same, strict=True)
        squares[list(rows)] = resized_together(alike, size_px)


def _decode_if_small(content: bytes, size_px: int, name: str) -> Image.Image | None:
    """The RGB image; None for one of many pixels, which may compress to few bytes."""
    with _named_faults(content, name):
        image = _open(content, 2 * size_px)[0]
        return _to_rgb(_upright(image)) if max(image.size) <= _SMALL_PX else None


def open_image(source: bytes | str | os.PathLike[str] | Image.Image, name: str = "") -> Image.Image:
    """The image as it is, in any mode and size, but upright. Raises DataError as `decode_image`."""
    name = name or (str(source) if isinstance(source, (str, os.PathLike)) else "image")
    content = _content(source, name) if isinstance(source, (str, os.PathLike)) else source
    with _named_faults(content, name):
        return _upright(_open(content)[0] if isinstance(content, bytes) else content)


def rgb_image(source: bytes | str | os.PathLike[str] | Image.Image, name: str = "") -> Image.Image:
    """The image in its own size, upright and in mode RGB as `decode_image` converts it. Raises
    DataError as that.
    """
    name = name or (str(source) if isinstance(source, (str, os.PathLike)) else "image")
    image = open_image(source, name)
    with _named_faults(image, name):
        image.load()
        return _to_rgb(image)


@contextlib.contextmanager
def _named_faults(content: bytes | Image.Image, name: str) -> Iterator[None]:
    """Raise DataError that names the image for whatever goes wrong while it is decoded."""
    try:
        _ignore_warnings()
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except UnidentifiedImageError:
        assert isinstance(content, bytes)
        raise DataError(f"{name}: cannot be decoded: {explain(content)}") from None
    except Image.DecompressionBombError:
        raise DataError(
            f"{name}: refused, more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; scale it"
            " down"
        ) from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise DataError(
            f"{name}: cannot be decoded ({error}); expected a whole {EXPECTED} image"
        ) from None


def _content(path: str | os.PathLike[str], name: str) -> bytes:
    return read_path(path, name, "an image")


def _ignore_warnings() -> None:
    """Ignore Pillow's warnings about damaged metadata and many pixels, which change nothing.

    Filters belong to the whole process, so this one stays: putting back those from before would
    undo what another thread has set meanwhile.
    """
    if warnings.filters[:1] != [_NO_WARNINGS]:
        warnings.filterwarnings("ignore", module=_NO_WARNINGS[3].pattern)


def _open(content: bytes, least_px: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Load an image; a JPEG as small as still covers `least_px` in both directions, if that is
    given. Its own width and height are returned, too. A PNG that cannot be read is tried again
    without its metadata, because Pillow rejects a PNG with a text of over a megabyte.
    """
    try:
        return _loaded(content, least_px)
    except Exception:
        if extension_of(content) != "png":
            raise
        return _loaded(_png_without_metadata(content))


def _loaded(content: bytes, least_px: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    image = Image.open(io.BytesIO(content), formats=readable_formats())
    size = image.size
    is_draft = least_px is not None and image.draft(None, (least_px, least_px)) is not None
    image.load()
    return image, size if is_draft else image.size  # loading turns a TIFF upright


def _png_without_metadata(content: bytes) -> bytes:
    """The chunks that make the pixels; each is a length, a name, as many bytes and a checksum."""
    start, kept = 8, [content[:8]]
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4])
        if content[start + 4 : start + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of an image."""
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright, if its EXIF data say so; damaged ones are ignored."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as many kinds as there are ways to damage EXIF data
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to mode RGB. 16-bit grey keeps its full range: 0..65535 becomes 0..255, where Pillow
    would clip at 255.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(
                "an image of values beyond 16 bits has no known range; convert it to 8 or 16 bits"
            )
        return Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(
            "an image of floating point values has no known range; convert it to 8 or 16 bits"
        )
    if image.mode == "P":  # by way of RGBA: a palette with transparency makes Pillow warn otherwise
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
