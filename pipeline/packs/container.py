"""The container: named tensors and one text in a safetensors file, with a digest over all of it.

    8 bytes   N, little-endian: the header's length
    N bytes   JSON: {"__metadata__": {"format", "version", "digest", "pack"}, name: {"dtype", "shape", "data_offsets"}, ...}, padded to 8 bytes
    the rest  the tensors end to end, without gaps, widest type first so that each is aligned

Any safetensors reader opens it. It is written here, not by the library, because the library orders `__metadata__` differently in every call and the
same pack must be the same bytes. The digest is the SHA-256 of the text and of every tensor's name, type, shape and bytes. Nothing is used before it
is checked, and no length is believed that the file itself does not back.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import PackDamaged, PackError, PackForeign, PackTruncated, PackVersionError
from pipeline.packs.metadata import FORMAT_VERSION

MAX_HEADER_BYTES = 1_000_000
_FORMAT = "taskpack"
_NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "U8": "|u1"}  # in file order: the widest first
_NAMES = {np.dtype(numpy_type): name for name, numpy_type in _NUMPY_TYPES.items()}
_LENGTH_BYTES = 8

Tensors = dict[str, NDArray[Any]]
_Size = Annotated[int, Field(ge=0, lt=2**48)]


class _Entry(BaseModel):
    """A tensor's line in the header."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: Literal["F32", "F16", "U8"]
    shape: Annotated[list[_Size], Field(max_length=4)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(_NUMPY_TYPES[self.dtype]).itemsize


def container_to_bytes(text: str, tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The file's bytes; tensors are float32, float16 or uint8. Raises PackError where the header would be longer than a reader accepts."""
    in_order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {
        "__metadata__": {"format": _FORMAT, "version": str(FORMAT_VERSION), "digest": _digest(str(FORMAT_VERSION), text, tensors), "pack": text}
    }
    start = 0
    for name, tensor in in_order:
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]}
        start += tensor.nbytes
    header_bytes = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    header_bytes += b" " * (-len(header_bytes) % _LENGTH_BYTES)
    if len(header_bytes) > MAX_HEADER_BYTES:
        raise PackError(f"the metadata takes {len(header_bytes)} bytes; at most {MAX_HEADER_BYTES} fit; shorten the class names")
    return b"".join([len(header_bytes).to_bytes(_LENGTH_BYTES, "little"), header_bytes, *(tensor.tobytes() for _, tensor in in_order)])


def container_from_bytes(data: bytes) -> tuple[str, Tensors]:
    """The text and the tensors (read-only). Raises PackForeign, PackTruncated, PackVersionError or PackDamaged."""
    header, body = _split(data)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise PackForeign("a safetensors file, but not a taskpack pack")
    version, digest, text = _claims(metadata)
    tensors = _tensors(header, body)
    if _digest(version, text, tensors) != digest:
        raise PackDamaged("the content does not match its digest; copy or download the pack again")
    return text, tensors


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    header_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) >= _LENGTH_BYTES and not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise PackForeign(f"not a safetensors file: a header of {header_bytes} bytes; expected 2 to {MAX_HEADER_BYTES}")
    if len(data) < _LENGTH_BYTES + header_bytes:
        raise PackTruncated(f"the file ends after {len(data)} bytes, within its header")
    start = _LENGTH_BYTES + header_bytes
    try:
        header = json.loads(data[_LENGTH_BYTES:start].decode())
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise PackForeign("not a safetensors file: its header is not a JSON object")
    return header, memoryview(data)[start:]


def _claims(metadata: dict[str, Any]) -> tuple[str, str, str]:
    """Version, digest and text, as the file claims them."""
    version = metadata.get("version")
    if isinstance(version, str) and version.isascii() and version.isdigit() and int(version[:9]) > FORMAT_VERSION:
        raise PackVersionError(f"written by format version {version[:20]}; this taskpack reads version {FORMAT_VERSION}; upgrade taskpack")
    expected = {"format", "version", "digest", "pack"}
    if version != str(FORMAT_VERSION) or set(metadata) != expected or not all(isinstance(value, str) for value in metadata.values()):
        raise PackDamaged(f"expected the texts {', '.join(sorted(expected))} in the header")
    return version, metadata["digest"], metadata["pack"]


def _tensors(header: dict[str, Any], body: memoryview) -> Tensors:
    """Views of `body`, which they must fill exactly, one after the other."""
    entries = sorted(((name, _entry(name, value)) for name, value in header.items()), key=lambda item: item[1].data_offsets)
    end_bytes = max((entry.data_offsets[1] for _, entry in entries), default=0)
    if end_bytes > len(body):
        raise PackTruncated(f"the tensors take {end_bytes} bytes; the file holds {len(body)} of them")
    tensors: Tensors = {}
    stop_bytes = 0
    for name, entry in entries:
        if entry.data_offsets != [stop_bytes, stop_bytes + entry.size_bytes]:
            raise PackDamaged(f"tensor {name!r}: {entry.dtype} {entry.shape} cannot lie at bytes {entry.data_offsets}")
        chunk = body[stop_bytes : stop_bytes + entry.size_bytes]
        try:
            tensors[name] = np.frombuffer(chunk, _NUMPY_TYPES[entry.dtype]).reshape(entry.shape)
        except ValueError:  # a zero beside sizes whose product numpy refuses
            raise PackDamaged(f"tensor {name!r}: no array can have the shape {entry.shape}") from None
        stop_bytes += entry.size_bytes
    if stop_bytes != len(body):
        raise PackDamaged(f"{len(body) - stop_bytes} bytes after the last tensor")
    return tensors


def _entry(name: str, value: Any) -> _Entry:
    try:
        return _Entry.model_validate(value)
    except ValidationError as error:
        raise PackDamaged(f"tensor {name!r}: {error.errors(include_url=False)[0]['msg']}") from None


def _digest(version: str, text: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    in_order = sorted(tensors.items())
    described = [[name, _NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in in_order]
    # the JSON says how long everything after it is, so no two contents feed the hash the same bytes
    digest = hashlib.sha256(json.dumps([_FORMAT, version, text, described]).encode())
    for _, tensor in in_order:
        digest.update(tensor.tobytes())
    return digest.hexdigest()
