"""Attacks on the reader: whatever the bytes, it raises a named error or returns the very same pack,
quickly and in little memory.
"""

import hashlib
import json
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers_cases import for_every
from helpers_packs import assert_same, example_pack
from safetensors.numpy import save

from pipeline.errors import PackDamaged, PackForeign, PackTruncated, PackVersionError
from pipeline.packs import Pack, pack_to_bytes, read_pack
from pipeline.packs.container import container_from_bytes, container_to_bytes
from pipeline.packs.description import Description
from pipeline.packs.dictionary import dictionary
from pipeline.packs.metadata import FORMAT_VERSION
from pipeline.testing import check_pack_reader

PACK = example_pack()
DATA = pack_to_bytes(PACK)
HEADER_BYTES = int.from_bytes(DATA[:8], "little")


def header_of(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + HEADER_BYTES])


def with_header(
    header: dict[str, Any] | list[Any] | str, body: bytes = DATA[8 + HEADER_BYTES :]
) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + body


# --- damage ---------------------------------------------------------------------------------------


def test_damaged_files_are_refused_or_give_the_same_pack() -> None:
    check_pack_reader(read_pack, pack_to_bytes, DATA, truncation=PackTruncated, mutations=10_000)


def unchecked(data: bytes) -> Pack:
    """Read a pack as if its digest were right, whatever it is."""
    _, content = container_from_bytes(data[:-32] + hashlib.sha256(data[:-32]).digest())
    return read_pack(container_to_bytes(content))


def padded(data: bytes) -> Pack:
    """Read a shortened pack as if zeros had been cut off."""
    return read_pack(DATA if DATA.startswith(data) else data)


def unguarded(data: bytes) -> Pack:
    """Read the header before anything is checked."""
    header_of(data)
    return read_pack(data)


def greedy(data: bytes) -> Pack:
    """Reserve what the header's length says."""
    bytearray(min(int.from_bytes(data[:8], "little"), 20_000_000))
    return read_pack(data)


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (padded, "shortened to .*: accepted"),
        (unguarded, "JSONDecodeError"),
        (unchecked, "another pack is read"),
        (greedy, "takes .* bytes"),
    ],
)
def test_a_reader_that_breaks_a_promise_fails_the_check(
    read: Callable[[bytes], Pack], fault: str
) -> None:
    with pytest.raises(AssertionError, match=fault):
        check_pack_reader(read, pack_to_bytes, DATA, mutations=100)


def test_a_writer_that_breaks_a_promise_fails_the_check() -> None:
    with pytest.raises(AssertionError, match="round trip"):
        check_pack_reader(read_pack, lambda pack: pack_to_bytes(pack) + b"\0", DATA)


@pytest.mark.parametrize("byte", [8 + HEADER_BYTES, len(DATA) // 2, len(DATA) - 1])
def test_damage_in_the_content_or_its_digest_is_called_damage(byte: int) -> None:
    with pytest.raises(PackDamaged, match="digest"):
        read_pack(DATA[:byte] + bytes([DATA[byte] ^ 1]) + DATA[byte + 1 :])


# --- files that are something else ----------------------------------------------------------------


@for_every(
    "data",
    [
        b"hello world, this is a text file\n" * 9,
        b"PK\x03\x04" + bytes(200),
        bytes(64),
        with_header("not json"),
        with_header([1, 2]),
        with_header("[" * 100_000),
        with_header("9" * 100_000),
        with_header('{"a": "\\ud800'),
        with_header({"__metadata__": {"format": "pt"}}),
        with_header({"__metadata__": "taskpack"}),
        save({"weight": np.zeros((2, 2), np.float64)}),
        save({"weight": np.zeros(2, np.float32)}, {"format": "np"}),
    ],
)
def test_foreign_files_are_called_foreign(data: bytes) -> None:
    with pytest.raises(PackForeign):
        read_pack(data)


def test_an_empty_file_is_truncated() -> None:
    with pytest.raises(PackTruncated):
        read_pack(b"")


@for_every(
    ("version", "message"),
    [("6", "upgrade"), ("17", "upgrade"), ("9" * 5000, "upgrade"), ("1", "run its task again")],
)
def test_another_version_is_told_apart_from_damage(version: str, message: str) -> None:
    header = header_of(DATA)
    header["__metadata__"] |= {"version": version, "novelty": "unknown to us"}
    with pytest.raises(PackVersionError, match=message):
        read_pack(with_header(header))


# --- headers that lie -----------------------------------------------------------------------------


@for_every("value", ["0", 2, "two", None, "2 "])
def test_a_version_that_is_none_is_damage(value: Any) -> None:
    header = header_of(DATA)
    header["__metadata__"]["version"] = value
    with pytest.raises(PackDamaged, match="version"):
        read_pack(with_header(header))


@for_every(
    "change",
    [
        {"shape": [2**47]},
        {"shape": [len(DATA)]},
        {"shape": [4]},
        {"shape": [0]},
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": 3},
        {"shape": [1] * 100},
        {"shape": [2**70]},
        {"dtype": "F32"},
        {"data_offsets": [0, 0]},
        {"data_offsets": [8, 4]},
        {"data_offsets": "04"},
        {"more": 1},
    ],
)
def test_a_tensor_that_does_not_fit_the_file_is_refused(change: dict[str, Any]) -> None:
    header = header_of(DATA)
    header["pack"] |= change
    with pytest.raises((PackDamaged, PackTruncated)):
        read_pack(with_header(header))


def test_tensors_beside_the_pack_and_bytes_behind_it_are_damage() -> None:
    header = header_of(DATA)
    with pytest.raises(PackDamaged, match="nothing else"):
        read_pack(with_header(header | {"smuggled": header["pack"]}))
    with pytest.raises(PackDamaged, match="nothing else"):
        read_pack(DATA + b"\0")
    with pytest.raises(PackDamaged, match="one tensor 'pack'"):
        read_pack(with_header({"__metadata__": header["__metadata__"], "puck": header["pack"]}))


# --- content that lies under a valid digest -------------------------------------------------------


def deflated(text: bytes) -> bytes:
    """As a description is, whatever the text."""
    deflater = zlib.compressobj(
        9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zdict=dictionary(FORMAT_VERSION)
    )
    return deflater.compress(text) + deflater.flush()


def with_description(data: bytes, rest: bytes | None = None) -> bytes:
    """The pack with another compressed description before the same numbers, and a digest that
    agrees.
    """
    _, content = container_from_bytes(DATA)
    after = content[4 + int.from_bytes(content[:4], "little") :] if rest is None else rest
    return container_to_bytes(len(data).to_bytes(4, "little") + data + after)


def forge(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The pack with its description changed in place."""
    _, content = container_from_bytes(DATA)
    described = Description.from_bytes(
        content[4 : 4 + int.from_bytes(content[:4], "little")]
    ).model_dump(mode="json")
    change(described)
    return with_description(deflated(json.dumps(described).encode()))


def test_a_forgery_without_changes_is_the_pack() -> None:
    assert_same(read_pack(forge(lambda described: None)), PACK)


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value of the description."""

    def change(described: Any) -> None:
        for key in path[:-1]:
            described = described[key]
        described[path[-1]] = value

    return change


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "huge shape": put("parts", 3, "tensors", 0, 1, value=[2**31 - 1] * 8),
    "huge count of connections": put("parts", 0, "tensors", 0, 1, value=[2**31 - 1]),
    "huge layer": put("parts", 0, "layers", 0, value=[2**31 - 1, 2**31 - 1]),
    "one value more": put("parts", 1, "tensors", 0, 1, value=[10]),
    "shape of other groups": put("parts", 3, "tensors", 0, 1, value=[4, 3, 8]),
    "empty shape dimension": put("parts", 1, "tensors", 0, 1, value=[0]),
    "negative dimension": put("parts", 1, "tensors", 0, 1, value=[-3, -3]),
    "scalar connections": put("parts", 0, "tensors", 0, 1, value=[]),
    "two-dimensional connections": put("parts", 0, "tensors", 0, 1, value=[9, 2]),
    "more connections than the layer has": put("parts", 0, "layers", 0, value=[2, 2]),
    "fewer columns": put("parts", 0, "layers", 0, value=[9, 2]),
    "other bits": put("parts", 0, "bits", value=8),
    "wide bits": put("parts", 0, "bits", value=32),
    "unknown bits": put("parts", 0, "bits", value=9),
    "bits as text": put("parts", 0, "bits", value="four"),
    "too few layers": put("parts", 0, "layers", value=[[9, 16]]),
    "no layers": put("parts", 0, "layers", value=[]),
    "layers on a head": put("parts", 4, "layers", value=[[5, 16]]),
    "positions on a head": put("parts", 4, "positions", value=1),
    "longer positions": put("parts", 0, "positions", value=2**30),
    "recomputed positions": put("parts", 0, "positions", value="recomputed"),
    "negative positions": put("parts", 0, "positions", value=-1),
    "unknown part": put("parts", 4, "name", value="tail"),
    "unknown key": put("parts", 4, "code", value="import os"),
    "part left out": lambda described: described["parts"].pop(),
    "part twice": lambda described: described["parts"].append(described["parts"][-1]),
    "tensor stored twice": put("parts", 5, "tensors", 0, 0, value="head.weight"),
    "parts that are no list": put("parts", value={"1": 2}),
    "no probe": put("probe", value=0),
    "more probe images": put("probe", value=2**30),
    "more classes": put("metadata", "classes", value=list("abcdef")),
    "unknown metadata": put("metadata", "run", value="x"),
    "no fingerprint": put("metadata", "backbone", "fingerprint", value="short"),
    "seed as text": put("metadata", "seed", value="many"),
}


@for_every("name", FORGERIES)
def test_forgeries_are_damage(name: str) -> None:
    with pytest.raises(PackDamaged):
        read_pack(forge(FORGERIES[name]))


_, CONTENT = container_from_bytes(DATA)
NUMBERS = CONTENT[4 + int.from_bytes(CONTENT[:4], "little") :]
DESCRIPTION = CONTENT[4 : -len(NUMBERS)]


@for_every(
    "rest", [b"", NUMBERS[:-1], NUMBERS + b"\0", bytes(len(NUMBERS)), b"\xff" * len(NUMBERS)]
)
def test_other_numbers_under_a_valid_digest_are_damage(rest: bytes) -> None:
    with pytest.raises(PackDamaged):
        read_pack(with_description(DESCRIPTION, rest))


def test_mutated_numbers_under_a_valid_digest_are_damage_or_a_pack() -> None:
    rng = np.random.default_rng(7)
    for _ in range(300):
        numbers = bytearray(NUMBERS)
        for place in rng.integers(0, len(numbers), 3):
            numbers[place] = rng.integers(0, 256)
        try:
            pack = read_pack(with_description(DESCRIPTION, bytes(numbers)))
        except PackDamaged:
            continue
        assert_same(read_pack(pack_to_bytes(pack)), pack)


@for_every(
    "data",
    [
        deflated(b"[" * 100_000),
        DESCRIPTION[:-2],
        DESCRIPTION + b"more",
        deflated(b"\xff\xfe"),
        deflated(b'{"metadata":' + b"[" * 5000),
        deflated(b"{}"),
        b"",
        b"[]",
    ],
)
def test_damaged_descriptions_are_damage(data: bytes) -> None:
    with pytest.raises(PackDamaged):
        read_pack(with_description(data))


@for_every("content", [b"", b"\1", b"\xff\xff\xff\xff", b"\5\0\0\0abc"])
def test_content_without_a_description_is_damage(content: bytes) -> None:
    with pytest.raises(PackDamaged):
        read_pack(container_to_bytes(content))


def test_a_description_that_inflates_without_end_takes_little_memory() -> None:
    data = with_description(deflated(bytes(300_000_000)))
    tracemalloc.start()
    with pytest.raises(PackDamaged, match="at most"):
        read_pack(data)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 * len(data) + 8_000_000
