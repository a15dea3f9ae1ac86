"""Parts: values against a slow reference, and every contradiction refused by name."""

from typing import Any

import numpy as np
import pytest
from helpers_cases import for_every

from pipeline.errors import PackDamaged
from pipeline.packs import PART_BITS, LayerShape, Part, TensorSpec, levels, zero_part

BANK = (
    TensorSpec("smoa.down", (3, 2, 5)),
    TensorSpec("smoa.router", (4, 5)),
    TensorSpec("smoa.bias", (7,)),
)
LAYERS = (TensorSpec("blocks.0.fc", (8,)), TensorSpec("blocks.1.fc", (3,)))
PLACES = (np.array([0, 1, 8, 11, 15, 16, 18, 19]), np.array([8, 9, 26]))


def part(**changes: Any) -> Part:
    arguments = {"name": "head", "bits": 4, "tensors": (TensorSpec("head.weight", (3, 2)),)}
    arguments |= {"codes": np.arange(6, dtype=np.uint8), "scales": np.ones((1, 2), np.float32)}
    return Part(**{**arguments, **changes})


def connections(**changes: Any) -> Part:
    arguments = {
        "name": "connections",
        "bits": 32,
        "tensors": LAYERS,
        "codes": np.arange(11, dtype=np.float32),
    }
    arguments |= {"layers": ((4, 6), (3, 9)), "positions": PLACES}
    return Part(**{**arguments, **changes})


@for_every("bits", range(1, 9))
def test_low_bit_values_are_level_times_sd_plus_mean_of_each_matrix(bits: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, 30 + 20 + 7).astype(np.uint8)
    scales = np.abs(rng.normal(size=(3 + 1 + 1, 2))).astype(np.float16).astype(np.float32)
    values = Part("adapters", bits, BANK, codes, scales).values()
    group_of_value = [0] * 10 + [1] * 10 + [2] * 10 + [3] * 20 + [4] * 7
    slow = [
        levels(bits)[code] * scales[group, 1] + scales[group, 0]
        for code, group in zip(codes, group_of_value, strict=True)
    ]
    assert list(values) == [tensor.name for tensor in BANK]
    assert all(
        values[tensor.name].shape == tensor.shape and values[tensor.name].dtype == np.float32
        for tensor in BANK
    )
    np.testing.assert_array_equal(
        np.concatenate([value.ravel() for value in values.values()]), np.array(slow, np.float32)
    )


@pytest.mark.parametrize(("bits", "dtype"), [(16, np.float16), (32, np.float32)])
def test_wide_values_are_stored_as_they_are_and_handed_out_as_copies(
    bits: int, dtype: type
) -> None:
    codes = np.linspace(-3, 3, 57).astype(dtype)
    wide = Part("adapters", bits, BANK, codes)
    np.testing.assert_array_equal(
        wide.values()["smoa.router"], codes[30:50].astype(np.float32).reshape(4, 5)
    )
    wide.values()["smoa.bias"][:] = 9
    assert codes[-1] == 3


@for_every("bits", PART_BITS)
def test_zero_parts_are_valid(bits: int) -> None:
    bank = zero_part("adapters", bits, BANK)
    assert (bank.count, bank.groups) == (57, 5)
    assert all((value == 0).all() for value in bank.values().values())
    assert zero_part("connections", bits, LAYERS, PLACES, ((4, 6), (3, 9))).layer_shapes == (
        LayerShape(4, 6, 8),
        LayerShape(3, 9, 3),
    )


@for_every(
    ("changes", "message"),
    [
        ({"name": "tail"}, "expected one of connections"),
        ({"bits": 9}, "given 9 bits"),
        (
            {"tensors": (), "codes": np.zeros(0, np.uint8), "scales": np.zeros((0, 2), np.float32)},
            "holds no tensor",
        ),
        ({"tensors": (TensorSpec("a", (3,)), TensorSpec("a", (3,)))}, "same name"),
        ({"tensors": (TensorSpec("a", (3, 0)),)}, "holds no value"),
        ({"codes": np.arange(6)}, "uint8; given int64"),
        ({"codes": np.arange(7, dtype=np.uint8)}, "hold 6 values"),
        ({"codes": np.arange(6, dtype=np.uint8).reshape(3, 2)}, "hold 6 values"),
        ({"codes": np.full(6, 16, np.uint8)}, "code 16 does not fit in 4 bits"),
        ({"scales": None}, "expected float32 scales"),
        ({"scales": np.ones((2, 2), np.float32)}, "expected float32 scales"),
        ({"scales": np.ones((1, 2))}, "expected float32 scales"),
        ({"scales": np.array([[0, np.nan]], np.float32)}, "finite"),
        ({"scales": np.array([[0, -1]], np.float32)}, "std at least 0"),
        ({"scales": np.full((1, 2), 1.0001, np.float32)}, "float16 numbers"),
        ({"bits": 16, "codes": np.zeros(6, np.float16)}, "no scales"),
        ({"bits": 16, "codes": np.zeros(6, np.float32), "scales": None}, "float16; given float32"),
        ({"bits": 32, "codes": np.full(6, np.inf, np.float32), "scales": None}, "not finite"),
        ({"layers": ((2, 3),)}, "expected the shapes of 0 layers"),
    ],
)
def test_a_part_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    part()
    with pytest.raises(PackDamaged, match=message):
        part(**changes)


@for_every(
    ("changes", "message"),
    [
        ({"positions": ()}, "expected positions of 2 layers"),
        ({"recomputed": True}, "expected positions of 0 layers"),
        ({"layers": ((4, 6),)}, "shapes of 2 layers"),
        (
            {"layers": ((1, 6), (3, 9))},
            r"'blocks.0.fc' of shape \[8\] is no list of entries of a weight \[1, 6\]",
        ),
        ({"layers": ((3, 6), (3, 9))}, "layer 0: indices 0 to 19, the weight has 18"),
        ({"positions": (PLACES[0][:7], PLACES[1])}, r"layer 0: expected int64 \[8\]"),
        ({"positions": (PLACES[0].astype(np.int32), PLACES[1])}, "found int32"),
        ({"positions": (PLACES[0], np.array([8, 8, 26]))}, "layer 1: index 8 follows 8"),
    ],
)
def test_connections_must_say_where_they_are(changes: dict[str, Any], message: str) -> None:
    assert connections().encoded_positions
    assert connections(positions=(), recomputed=True).encoded_positions == b""
    with pytest.raises(PackDamaged, match=message):
        connections(**changes)
