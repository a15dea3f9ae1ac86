"""The fixed codebooks of low-bit weights: the levels that codes of 1 to 8 bits denote.

A matrix is normalised by its own mean and standard deviation, `z = (w - mu) / std`, and every z is
replaced by the nearest of 2^b levels; the file keeps the level's number and the two scales, and
`w_hat = levels[code] * std + mu`. The levels minimise the expected L1 error for z ~ N(0, 1) (Binary
Adapter, arXiv 2307.16867): each threshold is the midpoint of its neighbouring levels and each level
is the median of its bin,

    t_i = (l_i + l_{i+1}) / 2,      2 Phi(l_i) = Phi(t_{i-1}) + Phi(t_i).

`lloyd_max` is the other choice: each level is the mean of its bin, so the squared error is least
(Lloyd, 1982; Max, 1960).

Alternating the two steps needs tens of thousands of rounds at 8 bits, so the same fixed point is
found by Newton's method.

Legend: N levels, M = N/2 positive levels, G groups (one pair of scales each).
"""

from __future__ import annotations

import functools
from math import erfc, exp, pi, sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PackError

Codebook = Literal["median", "lloyd_max"]
MAX_CODE_BITS = 8
_DECIMALS = (
    7  # coarser than the rounding errors of any math library: every machine gets the same levels
)
_NEWTON_STEPS = 50


def levels(bits: int, codebook: Codebook = "median") -> NDArray[np.float32]:
    """The codebook [2^bits], ascending and symmetric about 0. Raises PackError unless 1 <= bits <=
    8.
    """
    return _levels(bits, codebook).astype(np.float32)


def thresholds(bits: int, codebook: Codebook = "median") -> NDArray[np.float32]:
    """The borders [2^bits - 1] between neighbouring levels, ascending: code = number of thresholds
    below z. Raises PackError as `levels`.
    """
    levels_N = _levels(bits, codebook)
    return ((levels_N[:-1] + levels_N[1:]) / 2).astype(np.float32)


def dequantise(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], bits: int, codebook: Codebook = "median"
) -> NDArray[np.float32]:
    """Weights in float32, in the shape of `codes`. `scales` [G, 2] holds (mean, std); codes are G
    equal runs in order.
    """
    codes_GX = codes.reshape(len(scales), -1)
    values_GX = levels(bits, codebook)[codes_GX] * scales[:, 1:2] + scales[:, 0:1]
    return values_GX.reshape(codes.shape)


@functools.cache
def _levels(bits: int, codebook: Codebook) -> NDArray[np.float64]:
    if not 1 <= bits <= MAX_CODE_BITS:
        raise PackError(f"codebook: given {bits} bits; expected 1 to {MAX_CODE_BITS}")
    positive_M = np.round(_positive_levels(2 ** (bits - 1), codebook), _DECIMALS)
    return np.concatenate([-positive_M[::-1], positive_M])


def _positive_levels(count: int, codebook: Codebook) -> NDArray[np.float64]:
    """The fixed point on the positive half [M]; by symmetry the lowest threshold is 0 and the
    highest infinity.
    """
    # start next to the solution: levels lie as dense as the density to the power 1/2 for the L1
    # error, 1/3 for the squared one (Zador, 1982)
    wide, distance = (
        (NormalDist(0.0, sqrt(2.0)), _distance_to_median)
        if codebook == "median"
        else (NormalDist(0.0, sqrt(3.0)), _distance_to_mean)
    )
    level_M = np.array(
        [wide.inv_cdf((count + index + 0.5) / (2 * count)) for index in range(count)]
    )
    for _ in range(_NEWTON_STEPS):
        residual_M, jacobian_MM = distance(level_M)
        step_M = np.linalg.solve(jacobian_MM, residual_M)
        level_M = level_M - step_M
        if np.abs(step_M).max() < 1e-12:
            return level_M
    raise AssertionError(f"Newton's method did not converge for {2 * count} levels")


def _distance_to_median(
    level_M: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The distance of each level [M] above the median of its bin, and the tridiagonal Jacobian [M,
    M] of that.
    """
    border = (level_M[:-1] + level_M[1:]) / 2
    # upper tails, not cumulative probabilities: they keep their digits far out
    tail = np.concatenate([[0.5], _tail(border), [0.0]])
    median_M = -_inverse_cdf((tail[:-1] + tail[1:]) / 2)
    # d median / d border = phi(border) / (2 phi(median)), and a border moves half as far as a level
    # next to it
    below = np.append(0.0, _density(border)) / (4 * _density(median_M))
    above = np.append(_density(border), 0.0) / (4 * _density(median_M))
    jacobian = np.diag(1 - below - above) - np.diag(above[:-1], 1) - np.diag(below[1:], -1)
    return level_M - median_M, jacobian


def _distance_to_mean(
    level_M: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The distance of each level [M] above the mean of its bin, and the tridiagonal Jacobian [M, M]
    of that.
    """
    border = (level_M[:-1] + level_M[1:]) / 2
    tail, density = (
        np.concatenate([[0.5], _tail(border), [0.0]]),
        np.concatenate([[1 / sqrt(2 * pi)], _density(border), [0.0]]),
    )
    share_M = tail[:-1] - tail[1:]
    mean_M = (density[:-1] - density[1:]) / share_M
    # d mean / d upper border = phi (border - mean) / share, d mean / d lower border = phi (mean -
    # border) / share
    below = np.append(0.0, density[1:-1] * (mean_M[1:] - border) / (2 * share_M[1:]))
    above = np.append(density[1:-1] * (border - mean_M[:-1]) / (2 * share_M[:-1]), 0.0)
    return level_M - mean_M, np.diag(1 - below - above) - np.diag(above[:-1], 1) - np.diag(
        below[1:], -1
    )


def _tail(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([erfc(value / sqrt(2)) / 2 for value in values.tolist()])


def _inverse_cdf(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([NormalDist().inv_cdf(probability) for probability in probabilities.tolist()])


def _density(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([exp(-value * value / 2) / sqrt(2 * pi) for value in values.tolist()])
