"""The container: one string of bytes in a safetensors file, and the digest of all that comes before
it.

    8 bytes    N, little-endian: the header's length
    N bytes    JSON, padded with spaces to a multiple of 8:
               {"__metadata__":{"format":"taskpack","version":"5"},"pack":{"dtype":"U8","shape":[S],"data_offsets":[0,S]}}
    S - 32     the content (file.py)
    32 bytes   SHA-256 of every byte before it

Any safetensors reader opens it. A pack has one tensor, not one for each part, because a tensor's
line in the header takes some 75 bytes and a whole pack a few thousand. The digest is what a
signature would sign. Nothing is used before it is checked.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pipeline.errors import PackDamaged, PackForeign, PackTruncated, PackVersionError
from pipeline.packs.metadata import FORMAT_VERSION

MAX_HEADER_BYTES = 1_000_000
READ_VERSIONS = (2, 3, 4, FORMAT_VERSION)
DIGEST_BYTES = 32
_FORMAT = "taskpack"
_LENGTH_BYTES = 8


def container_to_bytes(content: bytes) -> bytes:
    """The file's bytes."""
    header = _header(len(content) + DIGEST_BYTES)
    signed = len(header).to_bytes(_LENGTH_BYTES, "little") + header + content
    return signed + hashlib.sha256(signed).digest()


def container_from_bytes(data: bytes) -> tuple[int, bytes]:
    """Format version, and the content. Raises PackForeign, PackTruncated, PackVersionError or
    PackDamaged.
    """
    header, start = _read_header(data)
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise PackForeign("a safetensors file, but not a taskpack pack")
    version = _checked_version(metadata.get("version"))
    size_bytes = _claimed_size_bytes(header)
    if len(data) - start < size_bytes:
        raise PackTruncated(
            f"the pack takes {size_bytes} bytes; the file holds {len(data) - start} of them"
        )
    if (
        data[:start] != start_of_file(size_bytes, version)
        or len(data) - start != size_bytes
        or size_bytes < DIGEST_BYTES
    ):
        raise PackDamaged(f"expected one tensor 'pack' and nothing else in {len(data)} bytes")
    if content_digest(data) != data[-DIGEST_BYTES:].hex():
        raise PackDamaged("the content does not match its digest; copy or download the pack again")
    return version, data[start:-DIGEST_BYTES]


def content_digest(data: bytes) -> str:
    """SHA-256 hex of a pack's bytes but the last 32, which hold the same: what a signature
    signs.
    """
    return hashlib.sha256(memoryview(data)[:-DIGEST_BYTES]).hexdigest()


def start_of_file(size_bytes: int, version: int = FORMAT_VERSION) -> bytes:
    """All that comes before a pack of so many bytes, its digest included."""
    header = _header(size_bytes, version)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header


def _header(size_bytes: int, version: int = FORMAT_VERSION) -> bytes:
    tensor = {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}
    header = {"__metadata__": {"format": _FORMAT, "version": str(version)}, "pack": tensor}
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _LENGTH_BYTES)


def _read_header(data: bytes) -> tuple[dict[str, Any], int]:
    header_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) >= _LENGTH_BYTES and not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise PackForeign(
            f"not a safetensors file: a header of {header_bytes} bytes; expected 2 to"
            f" {MAX_HEADER_BYTES}"
        )
    if len(data) < _LENGTH_BYTES + header_bytes:
        raise PackTruncated(f"the file ends after {len(data)} bytes, within its header")
    start = _LENGTH_BYTES + header_bytes
    try:
        header = json.loads(data[_LENGTH_BYTES:start].decode())
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise PackForeign("not a safetensors file: its header is not a JSON object")
    return header, start


def _checked_version(version: Any) -> int:
    if version in [str(known) for known in READ_VERSIONS]:
        return int(version)
    if (
        isinstance(version, str)
        and version.isascii()
        and version.isdigit()
        and int(version[:9]) > FORMAT_VERSION
    ):
        raise PackVersionError(
            f"written by format version {version[:20]}; this taskpack reads versions up to"
            f" {FORMAT_VERSION}; upgrade taskpack"
        )
    if version == "1":
        raise PackVersionError(
            "written by format version 1, which only development versions wrote; run its task"
            f" again for version {FORMAT_VERSION}"
        )
    raise PackDamaged(
        f"format version: expected the text {FORMAT_VERSION}, found {str(version)[:20]!r}"
    )


def _claimed_size_bytes(header: dict[str, Any]) -> int:
    tensor = header.get("pack")
    shape = tensor.get("shape") if isinstance(tensor, dict) else None
    if (
        isinstance(shape, list)
        and len(shape) == 1
        and type(shape[0]) is int
        and 0 <= shape[0] < 2**48
    ):
        return int(shape[0])
    raise PackDamaged("expected one tensor 'pack' of bytes")
