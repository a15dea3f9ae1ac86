"""The codebooks against published values, a slow alternation, and the conditions that define
them.
"""

import itertools
from statistics import NormalDist

import numpy as np
import pytest
from helpers_cases import for_every

from pipeline.errors import PackError
from pipeline.packs import dequantise, levels, thresholds

NORMAL = NormalDist()
PUBLISHED_POSITIVE = {
    1: ([0.6745], []),
    2: ([0.3778, 1.2657], [0.8217]),
    4: (
        [0.1056, 0.319, 0.5401, 0.7752, 1.034, 1.3331, 1.7077, 2.2655],
        [0.2123, 0.4296, 0.6576, 0.9046, 1.1836, 1.5204, 1.9866],
    ),
}


def alternate(level: list[float], rounds: int) -> list[float]:
    """Threshold = midpoint of neighbours, level = median of its bin: the definition, one value at a
    time.
    """
    for _ in range(rounds):
        border = [(low + high) / 2 for low, high in itertools.pairwise(level)]
        cumulative = [0.0, *(NORMAL.cdf(value) for value in border), 1.0]
        level = [NORMAL.inv_cdf((low + high) / 2) for low, high in itertools.pairwise(cumulative)]
    return level


@pytest.mark.parametrize("bits", PUBLISHED_POSITIVE)
def test_levels_and_thresholds_are_the_published_ones(bits: int) -> None:
    positive_levels, positive_thresholds = PUBLISHED_POSITIVE[bits]
    np.testing.assert_allclose(
        levels(bits), [-v for v in positive_levels[::-1]] + positive_levels, atol=6e-5
    )
    np.testing.assert_allclose(
        thresholds(bits),
        [-v for v in positive_thresholds[::-1]] + [0.0] + positive_thresholds,
        atol=6e-5,
    )


@for_every("bits", [1, 2, 3, 4])
def test_alternation_from_elsewhere_ends_at_the_same_levels(bits: int) -> None:
    start = [NORMAL.inv_cdf((index + 0.5) / 2**bits) for index in range(2**bits)]
    np.testing.assert_allclose(levels(bits), alternate(start, rounds=600), atol=1e-6)


# Max, 1960 (Quantizing for minimum distortion), table I.
LLOYD_MAX_POSITIVE = {
    1: [0.7980],
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}


@for_every("bits", LLOYD_MAX_POSITIVE)
def test_lloyd_max_levels_are_the_published_ones(bits: int) -> None:
    np.testing.assert_allclose(
        levels(bits, "lloyd_max")[2 ** (bits - 1) :], LLOYD_MAX_POSITIVE[bits], atol=6e-4
    )


@for_every("bits", range(1, 9))
def test_lloyd_max_levels_are_the_means_of_their_bins(bits: int) -> None:
    """Each mean by summing over a fine grid."""
    grid, level = np.linspace(-9, 9, 2_000_001), levels(bits, "lloyd_max").astype(np.float64)
    assert (np.diff(level) > 0).all()
    assert (level == -level[::-1]).all()
    bins = np.searchsorted((level[:-1] + level[1:]) / 2, grid)
    density = np.exp(-grid * grid / 2)
    means = np.bincount(bins, grid * density) / np.bincount(bins, density)
    np.testing.assert_allclose(level, means, atol=2e-5)


def test_each_codebook_is_best_at_its_own_error() -> None:
    z = np.random.default_rng(0).standard_normal(100_000)
    error = {
        kind: z - levels(3, kind)[np.searchsorted(thresholds(3, kind), z)]
        for kind in ("median", "lloyd_max")
    }
    assert np.abs(error["median"]).mean() < np.abs(error["lloyd_max"]).mean()
    assert np.square(error["lloyd_max"]).mean() < np.square(error["median"]).mean()


@for_every("bits", range(1, 9))
def test_one_more_round_of_alternation_changes_nothing(bits: int) -> None:
    np.testing.assert_allclose(levels(bits), alternate(levels(bits).tolist(), rounds=1), atol=1e-6)


@for_every("bits", range(1, 9))
def test_codebooks_are_float32_ascending_symmetric_and_between_each_other(bits: int) -> None:
    level, border = levels(bits), thresholds(bits)
    assert level.dtype == border.dtype == np.float32
    assert (level.shape, border.shape) == ((2**bits,), (2**bits - 1,))
    np.testing.assert_array_equal(level, -level[::-1])
    assert (level[:-1] < border).all()
    assert (border < level[1:]).all()
    assert border[2 ** (bits - 1) - 1] == 0


def test_more_bits_mean_a_smaller_error_on_normal_weights() -> None:
    z = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    errors = [
        float(np.abs(z - levels(bits)[np.searchsorted(thresholds(bits), z)]).mean())
        for bits in range(1, 9)
    ]
    assert all(fine < 0.6 * coarse for coarse, fine in itertools.pairwise(errors))


def test_the_code_is_the_number_of_the_nearest_level() -> None:
    z = np.random.default_rng(1).normal(size=500).astype(np.float32)
    for bits in (1, 3, 8):
        nearest = np.abs(z[:, None].astype(np.float64) - levels(bits)[None]).argmin(axis=1)
        np.testing.assert_array_equal(np.searchsorted(thresholds(bits), z), nearest)


def test_a_caller_cannot_spoil_the_codebook_for_the_next_one() -> None:
    levels(2)[:] = 7
    np.testing.assert_allclose(levels(2)[-1], 1.2657, atol=6e-5)


def test_dequantise_uses_each_groups_own_scales() -> None:
    codes = np.array([[[0, 1], [3, 2]], [[2, 2], [1, 0]]], np.uint8)
    scales = np.array([[0.5, 2.0], [-1.0, 0.1]], np.float32)
    slow = np.empty(codes.shape, np.float32)
    for index in np.ndindex(codes.shape):
        slow[index] = levels(2)[codes[index]] * scales[index[0], 1] + scales[index[0], 0]
    fast = dequantise(codes, scales, 2)
    assert fast.dtype == np.float32
    np.testing.assert_array_equal(fast, slow)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_have_no_codebook(bits: int) -> None:
    with pytest.raises(PackError, match="1 to 8"):
        levels(bits)
