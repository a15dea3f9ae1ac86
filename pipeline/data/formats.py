"""The supported image formats, and the type of a file by its first bytes, regardless of its
name.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module

EXTENSIONS = {
    "JPEG": ("jpg", "jpeg", "jfif"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "TIFF": ("tiff", "tif"),
    "GIF": ("gif",),
    "AVIF": ("avif",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "HEIF": ("heic", "heif"),
}
"""File name extensions by Pillow's name of the format; the first one is written to shards.

Pillow knows dozens more, some of which (EPS) start other programs.
"""

IMAGE_EXTENSIONS = tuple(
    extension for extensions in EXTENSIONS.values() for extension in extensions
)
FORMATS = tuple(name for name in EXTENSIONS if name != "HEIF")
EXPECTED = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"

CLOUD_EXTENSION = "cloud"
"""Of a point cloud in a shard, as `points.py` stores it."""
_CONVERT = "convert it to JPEG or PNG"
_SIGNATURES: tuple[tuple[str, bytes, str], ...] = (
    # Pillow's name of the format, or what else it is; its first bytes; what to do.
    ("JPEG", rb"\xff\xd8\xff", ""),
    ("PNG", rb"\x89PNG\r\n\x1a\n", ""),
    ("WEBP", rb"RIFF....WEBP", ""),
    ("BMP", rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00", ""),
    ("TIFF", rb"II[*+]\x00|MM\x00[*+]", ""),
    ("GIF", rb"GIF8[79]a", ""),
    ("AVIF", rb"....ftyp(avi[fs]|m[is]f1.{4,56}avi[fs])", ""),
    ("HEIF", rb"....ftyp(he[iv][cmsx]|m[is]f1)", ""),
    ("PPM", rb"P[1-6][\s#]", ""),
    ("a Git LFS pointer, not the file itself", rb"version https://git-lfs", "run `git lfs pull`"),
    ("a git-annex pointer, not the file itself", rb"/annex/objects/", "run `git annex get`"),
    ("a JPEG 2000 image", rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", _CONVERT),
    ("a JPEG XL image", rb"\xff\x0a|\x00\x00\x00\x0cJXL ", _CONVERT),
    ("an icon", rb"\x00\x00\x01\x00", _CONVERT),
    ("a Photoshop document", rb"8BPS", _CONVERT),
    ("a PDF document", rb"%PDF", _CONVERT),
    ("a PostScript document", rb"%!PS", _CONVERT),
    ("an SVG drawing", rb"\s*(<[?!][^>]*>\s*)*<svg", _CONVERT),
    (
        "an HTML page",
        rb"(?i:\s*(<[?!][^>]*>\s*)*<(html|head|body)|\s*<!doctype html)",
        "download the image again",
    ),
    ("an XML text", rb"\s*<\?xml", "download the image again"),
    ("a JSON text", rb"\s*(\{\s*[\"}]|\[\s*[\"\[{\]])", "download the image again"),
    (
        "a video",
        rb"....ftyp|RIFF....AVI |\x1a\x45\xdf\xa3|\x00\x00\x01\xba",
        "extract its frames as images",
    ),
    ("a ZIP archive", rb"PK\x03\x04", "unpack it"),
    ("a compressed file", rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf", "unpack it"),
    ("a tar archive", rb".{257}ustar", "unpack it"),
    ("a NumPy array", rb"\x93NUMPY", _CONVERT),
    ("an HDF5 file", rb"\x89HDF", _CONVERT),
    ("a DICOM image", rb".{128}DICM", _CONVERT),
    ("nothing but zero bytes", rb"\x00{64}", "copy it again"),
)
_PATTERNS = tuple(
    (what, re.compile(pattern, re.DOTALL), advice) for what, pattern, advice in _SIGNATURES
)
_HEAD_BYTES = 512


def extension_of(content: bytes) -> str | None:
    """The extension of an encoded image, or a stored point cloud; None if the format is unknown."""
    if content.startswith(b"\x93NUMPY"):
        return CLOUD_EXTENSION
    name, _ = _recognise(content)
    return EXTENSIONS[name][0] if name in EXTENSIONS else None


def explain(content: bytes) -> str:
    """A message that says why `content` is not a readable image, and what to do."""
    name, advice = _recognise(content)
    if name == "HEIF" and name not in readable_formats():
        return f"a HEIC image; {_CONVERT}, or install the package pillow-heif"
    if name in EXTENSIONS:
        return (
            f"a damaged {name} image, or of a kind that Pillow does not read; copy it again, or"
            f" {_CONVERT}"
        )
    return f"{name}; {advice}"


def _recognise(content: bytes) -> tuple[str, str]:
    """A message that says what `content` is, and what to do if it should have been an image."""
    if not content:
        return "the file is empty, 0 bytes", "copy it again"
    unknown = f"its first bytes are {content[:8]!r}, those of no image", f"expected {EXPECTED}"
    return _known(content) or unknown


def _known(content: bytes) -> tuple[str, str] | None:
    head = content[:_HEAD_BYTES]
    return next(
        ((name, advice) for name, pattern, advice in _PATTERNS if pattern.match(head)), None
    )


def kind_of(content: bytes) -> str | None:
    """The type of a file by its first bytes; None if it is unknown."""
    known = _known(content)
    return known[0] if known else None


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats to open, including HEIC if the package pillow-heif is
    installed.
    """
    try:
        import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return FORMATS
    return (*FORMATS, "HEIF")
