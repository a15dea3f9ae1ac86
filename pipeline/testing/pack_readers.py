"""What a reader of packs promises about bytes that anyone may have changed. The function raises
AssertionError where a promise is broken."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from pipeline.errors import PackError

_Pack = TypeVar("_Pack")
_LARGEST_PEAK_BYTES = 8_000_000


def check_pack_reader(
    read: Callable[[bytes], _Pack],
    write: Callable[[_Pack], bytes],
    content: bytes,
    *,
    refusal: type[Exception] = PackError,
    truncation: type[Exception] | None = None,
    mutations: int = 2000,
) -> None:
    """Check a reader of packs on a valid file and on damaged copies of it.

    The file survives a round trip. Every truncation is refused. A flipped bit in any byte, and
    random mutations, are refused or harmless: what is read gives the original file again. Nothing
    takes more than 8 MB of memory.

    Args:
        read: from a file's bytes to a pack.
        write: from a pack to its file's bytes.
        content: the bytes of a valid file, best a few kilobytes: each byte is attacked.
        refusal: the error that damaged files are refused with; any other error is a fault.
        truncation: the error of shortened files. Default: `refusal`.
        mutations: number of random mutations.
    """
    assert write(read(content)) == content, "the file does not survive a round trip"
    for size_bytes in range(len(content)):
        shortened = content[:size_bytes]
        message = f"shortened to {size_bytes} bytes"
        assert _is_refused(read, shortened, truncation or refusal, message), f"{message}: accepted"
    flips = (
        content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        for place in range(len(content))
    )
    rng = np.random.default_rng(2024)
    mutants = (_mutated(content, rng) for _ in range(mutations))
    tracemalloc.start()
    try:
        for attack, damaged in (("flipped bits", flips), ("mutations", mutants)):
            for number, each in enumerate(damaged):
                message = f"{attack}, number {number}"
                if not _is_refused(read, each, refusal, message):
                    assert write(read(each)) == content, f"{message}: another pack is read"
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < _LARGEST_PEAK_BYTES, f"reading damaged files takes {peak_bytes:,} bytes"


def _is_refused(
    read: Callable[[bytes], _Pack], content: bytes, refusal: type[Exception], message: str
) -> bool:
    """Whether `read` raises `refusal`; any other error is a fault."""
    try:
        read(content)
    except refusal:
        return True
    except Exception as error:
        name = type(error).__name__
        raise AssertionError(f"{message}: {name} ({error}); expected {refusal.__name__}") from error
    return False


def _mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One random change: bits flipped, bytes swapped, inserted, removed or repeated, or another
    length in the first eight bytes, where safetensors has that of the header."""
    data = bytearray(content)
    start, stop = sorted(int(place) for place in rng.integers(0, len(content), 2))
    match rng.integers(0, 6):
        case 0:
            for place in rng.integers(0, len(content), rng.integers(1, 5)):
                data[place] ^= 1 << int(rng.integers(0, 8))
        case 1:
            data[start], data[stop] = data[stop], data[start]
        case 2:
            data[start:start] = rng.bytes(int(rng.integers(1, 9)))
        case 3:
            del data[start : start + int(rng.integers(1, 9))]
        case 4:
            data[start:start] = data[stop : stop + 64]
        case _:
            limit = [len(content) // 2, 2 * len(content), 2**62][rng.integers(0, 3)]
            data[:8] = int(rng.integers(0, limit)).to_bytes(8, "little")
    return bytes(data)
