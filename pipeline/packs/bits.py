"""Bit packing: codes of any width from 1 to 32 bits, laid end to end, least significant bit first.

Code i of width w occupies the bits i*w ... i*w + w - 1 of the stream, where bit j is bit j % 8 of
byte j // 8. Codes may straddle bytes; the last byte is filled up with zero bits, and a reader
refuses anything else, so there is one byte string for each sequence of codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PackDamaged, PackError

MAX_WIDTH_BITS = 32


def packed_size_bytes(count: int, width_bits: int) -> int:
    """Bytes that `count` codes of `width_bits` take, the last byte rounded up."""
    return (count * width_bits + 7) // 8


def pack_codes(codes: NDArray[Any], width_bits: int) -> bytes:
    """Lay unsigned integer codes (any shape, row-major) end to end. Raises PackError for a bad
    width or a code that does not fit.
    """
    _check_width(width_bits)
    flat = np.ravel(codes)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >> width_bits):
        raise PackError(f"codes from {flat.min()} to {flat.max()} do not fit in {width_bits} bits")
    container_bytes = _container_bytes(width_bits)
    bytes_NB = flat.astype(f"<u{container_bytes}").view(np.uint8).reshape(-1, container_bytes)
    bits_NW = np.unpackbits(bytes_NB, axis=1, bitorder="little")[:, :width_bits]
    return np.packbits(bits_NW.ravel(), bitorder="little").tobytes()


def unpack_codes(data: bytes, count: int, width_bits: int) -> NDArray[np.uint32]:
    """The `count` codes [count] of `width_bits` each. Raises PackDamaged unless `data` is exactly
    as long as that and padded with zeros.
    """
    _check_width(width_bits)
    if count < 0 or len(data) != packed_size_bytes(count, width_bits):
        raise PackDamaged(
            f"{count} codes of {width_bits} bits take {packed_size_bytes(count, width_bits)} bytes;"
            f" found {len(data)}"
        )
    used_bits = count * width_bits % 8
    if used_bits and data[-1] >> used_bits:
        raise PackDamaged(f"the padding after {count} codes of {width_bits} bits is not zero")
    bits_NW = np.unpackbits(
        np.frombuffer(data, np.uint8), count=count * width_bits, bitorder="little"
    ).reshape(count, width_bits)
    container_bytes = _container_bytes(width_bits)
    bytes_NB = np.zeros((count, container_bytes), np.uint8)
    packed_NB = np.packbits(bits_NW, axis=1, bitorder="little")
    bytes_NB[:, : packed_NB.shape[1]] = packed_NB
    return bytes_NB.view(f"<u{container_bytes}").ravel().astype(np.uint32)


def _container_bytes(width_bits: int) -> int:
    return 1 if width_bits <= 8 else 2 if width_bits <= 16 else 4


def _check_width(width_bits: int) -> None:
    if not 1 <= width_bits <= MAX_WIDTH_BITS:
        raise PackError(f"width: given {width_bits} bits; expected 1 to {MAX_WIDTH_BITS}")
