"""An encoded image as a square of RGB bytes: the one way in, for training and for prediction.

The resize is plain bicubic to a square, antialiased, aspect not kept. Only the formats named here are opened: Pillow knows dozens, some of which
(EPS) start other programs. Its guard against decompression bombs stays on.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def decode_image(source: bytes | str | os.PathLike[str] | Image.Image, size_px: int, name: str = "") -> np.ndarray:
    """Decode `source` (encoded bytes, a file's path or a Pillow image) to uint8 [3, size_px, size_px].

    Grey, palette, CMYK and 16-bit grey images become RGB; EXIF orientation is applied; transparency is dropped. Raises DataError, which calls the
    image `name` (default: its path).
    """
    name = name or (str(source) if isinstance(source, (str, os.PathLike)) else "image")
    try:
        image = source if isinstance(source, Image.Image) else _open(source)
        square = _to_rgb(ImageOps.exif_transpose(image)).resize((size_px, size_px), Image.Resampling.BICUBIC)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{name}: refused, more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such image; check the path") from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise DataError(f"{name}: cannot be decoded ({error}); expected a whole {', '.join(FORMATS)} image") from None
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _open(source: bytes | str | os.PathLike[str]) -> Image.Image:
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    return Image.open(io.BytesIO(content), formats=FORMATS)


def _to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB. 16-bit grey keeps its full range: 0..65535 becomes 0..255, where Pillow would clip at 255."""
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
        return Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError("an image of floating point values has no known range; convert it to 8 or 16 bits")
    if image.mode == "P":  # by way of RGBA: a palette with transparency makes Pillow warn otherwise
        image = image.convert("RGBA")
    return image.convert("RGB")
