"""Bit packing: every width, odd tails, slow references, bad inputs."""

import numpy as np
import pytest
from helpers_cases import for_every
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PackDamaged, PackError
from pipeline.packs import pack_codes, packed_size_bytes, unpack_codes

EVERY_WIDTH = range(1, 33)


def slow_pack(codes: list[int], width_bits: int) -> bytes:
    """All codes as one large number."""
    number = sum(code << (index * width_bits) for index, code in enumerate(codes))
    return number.to_bytes((len(codes) * width_bits + 7) // 8, "little")


@settings(max_examples=12, derandomize=True, deadline=None)
@given(data=st.data())
def test_codes_survive_and_match_the_slow_reference(data: st.DataObject) -> None:
    for width_bits in EVERY_WIDTH:
        codes = data.draw(st.lists(st.integers(0, 2**width_bits - 1), max_size=21))
        packed = pack_codes(np.array(codes, np.uint32), width_bits)
        assert packed == slow_pack(codes, width_bits), width_bits
        assert len(packed) == packed_size_bytes(len(codes), width_bits), width_bits
        unpacked = unpack_codes(packed, len(codes), width_bits)
        assert unpacked.dtype == np.uint32, width_bits
        assert unpacked.tolist() == codes, width_bits


@for_every("width_bits", EVERY_WIDTH)
def test_the_largest_code_survives_at_every_size_and_one_more_is_refused(width_bits: int) -> None:
    for count in range(18):
        codes = np.full(count, 2**width_bits - 1, np.uint64)
        np.testing.assert_array_equal(
            unpack_codes(pack_codes(codes, width_bits), count, width_bits), codes
        )
    with pytest.raises(PackError, match="do not fit"):
        pack_codes(np.array([0, 2**width_bits], np.uint64), width_bits)


@for_every("width_bits", EVERY_WIDTH)
def test_any_other_length_and_any_set_padding_bit_is_damage(width_bits: int) -> None:
    packed = pack_codes(np.ones(5, np.uint32), width_bits)
    for wrong in (packed[:-1], packed + b"\0", b""):
        with pytest.raises(PackDamaged, match="bytes; found"):
            unpack_codes(wrong, 5, width_bits)
    for bit in range(5 * width_bits % 8 or 8, 8):
        with pytest.raises(PackDamaged, match="padding"):
            unpack_codes(packed[:-1] + bytes([packed[-1] | 1 << bit]), 5, width_bits)


def test_a_large_claimed_count_is_refused_before_it_takes_memory() -> None:
    with pytest.raises(PackDamaged):
        unpack_codes(b"\0" * 8, 2**60, 1)


@for_every("width_bits", [0, 33, -1])
def test_other_widths_are_refused(width_bits: int) -> None:
    with pytest.raises(PackError, match="1 to 32"):
        pack_codes(np.zeros(1, np.uint8), width_bits)
    with pytest.raises(PackError, match="1 to 32"):
        unpack_codes(b"", 0, width_bits)


def test_negative_codes_are_refused() -> None:
    with pytest.raises(PackError, match="-1"):
        pack_codes(np.array([3, -1]), 4)
