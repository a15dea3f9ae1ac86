"""Attacks on the reader: whatever the bytes, it raises a named error or returns the very same pack, quickly and in little memory."""

import json
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from test_packs_file import assert_same, example_pack

from pipeline.errors import PackDamaged, PackError, PackForeign, PackTruncated, PackVersionError
from pipeline.packs import pack_to_bytes, read_pack
from pipeline.packs.container import container_from_bytes, container_to_bytes

PACK = example_pack()
DATA = pack_to_bytes(PACK)
HEADER_BYTES = int.from_bytes(DATA[:8], "little")
Layout = list[dict[str, Any]]


def header_of(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + HEADER_BYTES])


def with_header(header: dict[str, Any] | list[Any] | str, body: bytes = DATA[8 + HEADER_BYTES :]) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + body


# --- damage ---------------------------------------------------------------------------------------------------------------------------------


def test_every_truncation_is_noticed() -> None:
    for size_bytes in range(len(DATA)):
        with pytest.raises(PackTruncated):
            read_pack(DATA[:size_bytes])


def test_every_flipped_bit_is_noticed() -> None:
    for byte in range(len(DATA)):
        assert_refused_or_same(DATA[:byte] + bytes([DATA[byte] ^ 1 << byte % 8]) + DATA[byte + 1 :])


@pytest.mark.parametrize("byte", [8 + HEADER_BYTES, len(DATA) - 1])
def test_damage_in_a_tensor_is_called_damage(byte: int) -> None:
    with pytest.raises(PackDamaged, match="digest"):
        read_pack(DATA[:byte] + bytes([DATA[byte] ^ 1]) + DATA[byte + 1 :])


def mutate(rng: np.random.Generator) -> bytes:
    """One random change: flipped bits, swapped, inserted, removed or repeated bytes, or another header length."""
    data, start, stop = bytearray(DATA), *sorted(int(place) for place in rng.integers(0, len(DATA), 2))
    match rng.integers(0, 6):
        case 0:
            for place in rng.integers(0, len(DATA), rng.integers(1, 5)):
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
            data[:8] = int(rng.integers(0, [HEADER_BYTES + 9, 2 * len(DATA), 2**62][rng.integers(0, 3)])).to_bytes(8, "little")
    return bytes(data)


def assert_refused_or_same(data: bytes) -> bool:
    """Whether it was refused."""
    try:
        pack = read_pack(data)
    except PackError:
        return True
    assert_same(pack, PACK)
    return False


def test_random_mutations_are_refused_or_harmless() -> None:
    rng = np.random.default_rng(2024)
    tracemalloc.start()
    refused = sum(assert_refused_or_same(mutate(rng)) for _ in range(2_000))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 1_900
    assert peak_bytes < 8_000_000


# --- files that are something else ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
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


@pytest.mark.parametrize("version", ["2", "17", "9" * 5000])
def test_a_newer_version_is_told_apart_from_damage(version: str) -> None:
    header = header_of(DATA)
    header["__metadata__"] |= {"version": version, "novelty": "unknown to us"}
    with pytest.raises(PackVersionError, match="upgrade"):
        read_pack(with_header(header))


# --- headers that lie -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "0"),
        ("version", 1),
        ("version", "one"),
        ("digest", "0" * 64),
        ("digest", None),
        ("pack", "{}"),
        ("pack", "\ud800"),
        ("extra", "text"),
    ],
)
def test_changed_claims_are_damage(key: str, value: Any) -> None:
    header = header_of(DATA)
    header["__metadata__"][key] = value
    with pytest.raises(PackDamaged):
        read_pack(with_header(header))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**40]},
        {"shape": [2**47, 2**47, 2**47, 2**47]},
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": 3},
        {"shape": [1] * 100},
        {"dtype": "F64"},
        {"dtype": "F16"},
        {"data_offsets": [0, 0]},
        {"data_offsets": [-4, 4]},
        {"data_offsets": [8, 4]},
        {"data_offsets": [0]},
        {"data_offsets": [0.0, 4.0]},
        {"data_offsets": "04"},
        {"more": 1},
    ],
)
@pytest.mark.parametrize("name", ["adapters.scales", "norms.codes"])
def test_entries_that_do_not_fit_the_file_are_damage(name: str, change: dict[str, Any]) -> None:
    header = header_of(DATA)
    header[name] |= change
    with pytest.raises(PackDamaged):
        read_pack(with_header(header))


def test_an_entry_beyond_the_end_is_truncation_and_bytes_beyond_the_entries_are_damage() -> None:
    header = header_of(DATA)
    header["head.codes"]["data_offsets"] = [0, 2**40]
    with pytest.raises(PackTruncated):
        read_pack(with_header(header))
    with pytest.raises(PackDamaged, match="after the last tensor"):
        read_pack(DATA + b"\0")


def test_overlapping_tensors_are_damage() -> None:
    header = header_of(DATA)
    header["smuggled"] = header["norms.codes"]
    with pytest.raises(PackDamaged):
        read_pack(with_header(header))


# --- content that lies under a valid digest -------------------------------------------------------------------------------------------------


def forge(change: Callable[[Layout, dict[str, Any]], Any]) -> bytes:
    """The pack with its layout and tensors changed in place, and a digest that agrees."""
    text, tensors = container_from_bytes(DATA)
    layout = json.loads(zlib.decompress(tensors["layout"].tobytes()))
    change(layout, tensors)
    if "layout" in tensors:
        tensors["layout"] = np.frombuffer(zlib.compress(json.dumps(layout).encode()), np.uint8)
    return container_to_bytes(text, tensors)


def test_a_forgery_without_changes_is_the_pack() -> None:
    assert_same(read_pack(forge(lambda layout, tensors: None)), PACK)


FORGERIES: dict[str, Callable[[Layout, dict[str, Any]], Any]] = {
    "huge shape": lambda layout, tensors: layout[3]["tensors"][0].__setitem__(1, [2**31 - 1] * 8),
    "huge count of rows": lambda layout, tensors: layout[0]["tensors"][0].__setitem__(1, [2**31 - 1, 2]),
    "one value more": lambda layout, tensors: layout[1]["tensors"][0].__setitem__(1, [10]),
    "shape of other groups": lambda layout, tensors: layout[3]["tensors"][0].__setitem__(1, [4, 3, 8]),
    "empty shape dimension": lambda layout, tensors: layout[1]["tensors"][0].__setitem__(1, [0]),
    "negative dimension": lambda layout, tensors: layout[1]["tensors"][0].__setitem__(1, [-3, -3]),
    "scalar connections": lambda layout, tensors: layout[0]["tensors"][0].__setitem__(1, []),
    "three-dimensional connections": lambda layout, tensors: layout[0]["tensors"][0].__setitem__(1, [9, 2, 1]),
    "other bits": lambda layout, tensors: layout[0].__setitem__("bits", 8),
    "wide bits": lambda layout, tensors: layout[0].__setitem__("bits", 32),
    "unknown bits": lambda layout, tensors: layout[0].__setitem__("bits", 3),
    "bits as text": lambda layout, tensors: layout[0].__setitem__("bits", "four"),
    "fewer columns": lambda layout, tensors: layout[0].__setitem__("columns", [9, 20]),
    "more columns": lambda layout, tensors: layout[0].__setitem__("columns", [33, 20]),
    "too few layers": lambda layout, tensors: layout[0].__setitem__("columns", [16]),
    "no columns": lambda layout, tensors: layout[0].__setitem__("columns", []),
    "columns on a head": lambda layout, tensors: layout[4].__setitem__("columns", [16]),
    "unknown part": lambda layout, tensors: layout[4].__setitem__("name", "tail"),
    "unknown key": lambda layout, tensors: layout[4].__setitem__("code", "import os"),
    "part left out": lambda layout, tensors: layout.pop(),
    "part twice": lambda layout, tensors: layout.append(layout[-1]),
    "tensor stored twice": lambda layout, tensors: layout[5]["tensors"][0].__setitem__(0, "head.weight"),
    "not a list": lambda layout, tensors: layout.__setitem__(slice(None), [1, 2]),
    "tensor left out": lambda layout, tensors: tensors.pop("head.scales"),
    "layout left out": lambda layout, tensors: tensors.pop("layout"),
    "probe left out": lambda layout, tensors: tensors.pop("probe"),
    "tensor too many": lambda layout, tensors: tensors.__setitem__("more", np.zeros(1, np.uint8)),
    "probe of other classes": lambda layout, tensors: tensors.__setitem__("probe", np.zeros((3, 4), np.float16)),
    "probe not finite": lambda layout, tensors: tensors.__setitem__("probe", np.full((3, 5), np.nan, np.float16)),
    "probe of another type": lambda layout, tensors: tensors.__setitem__("probe", np.zeros((3, 5), np.float32)),
    "scales of another shape": lambda layout, tensors: tensors.__setitem__("head.scales", np.ones((2, 1), np.float32)),
    "scales not finite": lambda layout, tensors: tensors.__setitem__("head.scales", np.full((1, 2), np.inf, np.float32)),
    "values not finite": lambda layout, tensors: tensors.__setitem__("norms.codes", np.full(16, np.nan, np.float32)),
    "positions cut": lambda layout, tensors: tensors.__setitem__("connections.positions", np.zeros(22, np.uint8)),
    "positions repeated": lambda layout, tensors: tensors.__setitem__("connections.positions", np.zeros(23, np.uint8)),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_are_damage(name: str) -> None:
    with pytest.raises(PackDamaged):
        read_pack(forge(FORGERIES[name]))


@pytest.mark.parametrize(
    "layout",
    [
        zlib.compress(b"[" * 100_000),
        zlib.compress(b"[]")[:-2],
        zlib.compress(b"[]") + b"more",
        zlib.compress(b"\xff\xfe"),
        b"",
        b"[]",
    ],
)
def test_damaged_layouts_are_damage(layout: bytes) -> None:
    text, tensors = container_from_bytes(DATA)
    with pytest.raises(PackDamaged):
        read_pack(container_to_bytes(text, {**tensors, "layout": np.frombuffer(layout, np.uint8)}))


def test_a_layout_that_inflates_without_end_takes_little_memory() -> None:
    text, tensors = container_from_bytes(DATA)
    bomb = zlib.compress(bytes(300_000_000), level=1)
    data = container_to_bytes(text, {**tensors, "layout": np.frombuffer(bomb, np.uint8)})
    tracemalloc.start()
    with pytest.raises(PackDamaged, match="at most"):
        read_pack(data)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 * len(data) + 8_000_000


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"task": 1}', '{"recipe":' + "[" * 5000, PACK.metadata.to_json().replace('"seed":3', '"seed":3,"run":"x"')]
)
def test_metadata_that_is_not_ours_is_damage(text: str) -> None:
    _, tensors = container_from_bytes(DATA)
    with pytest.raises(PackDamaged, match="metadata"):
        read_pack(container_to_bytes(text, tensors))
