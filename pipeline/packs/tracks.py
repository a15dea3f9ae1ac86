"""Which rows of a layer share one column model: heads that read similar columns do, others do not.

A layer's rows are cut into segments: the whole layer, or runs of 64 or 32 rows, the usual widths of
attention heads. Segments are dealt to tracks, and each track learns its own column statistics. In a
pretrained ViT the query and value heads choose among few columns of the residual stream and every
key head among others, so a layer's columns cost a sixth less than under one model. The encoder
deals greedily, by what a segment would cost in each track under the model of `columns.py`; the deal
itself is coded.

Legend: G segments of a layer, U distinct columns chosen in a layer, M tracks of a layer, O rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.packs.coder import Coder, Integers

SEGMENT_ROWS = (0, 64, 32)
"""Rows of a segment, by the number that the file gives; 0 is the whole layer."""
DISCOUNT, CONCENTRATION = 5, 20
"""Pitman-Yor's parameters in sixteenths: with n values of U kinds seen, kind c follows at odds 16
n[c] - 5, a new kind at odds 20 + 5 U.
"""
TRACK_WEIGHT = 24
"""Within a segment after the first, the track's statistics count as much as so many values of the
segment's own.
"""
_MOST_COMPARISONS = (
    1 << 26
)  # of a segment with a track, column by column; beyond, a layer is one track
_COST_UNIT = 256  # costs are whole numbers of 1/256 bit, so that no machine deals differently


def code_segments(
    coder: Coder, rows: int, odds_A: Integers, choice: tuple[int, Integers] | None
) -> tuple[int, Integers]:
    """Rows of a segment, at odds [A] that the layers before have left and this one adds to, and
    each segment's track [G].

    `choice` is what an encoder writes.
    """
    given = None if choice is None else np.array([SEGMENT_ROWS.index(choice[0])])
    number = int(coder.categorical(odds_A[None], np.zeros(1, np.int64), given)[0])
    odds_A[number] += 2
    segment_rows = SEGMENT_ROWS[number]
    if segment_rows == 0:
        return 0, np.zeros(1, np.int64)
    tracks: list[int] = []
    sizes: list[int] = []
    for segment in range(-(-rows // segment_rows)):
        given = None if choice is None else choice[1][segment : segment + 1]
        track = (
            int(coder.categorical(np.array([[*sizes, 1]]), np.zeros(1, np.int64), given)[0])
            if sizes
            else 0
        )
        if track >= len(sizes):
            track = len(sizes)
            sizes.append(0)
        sizes[track] += 1
        tracks.append(track)
    return segment_rows, np.array(tracks)


def choose_segments(counts_O: Integers, columns_N: Integers, columns: int) -> tuple[int, Integers]:
    """The cheapest deal of a layer's rows, which keep `counts_O` connections each at `columns_N`,
    row after row.
    """
    row_N = np.repeat(np.arange(len(counts_O)), counts_O)
    used_U, kind_N = np.unique(columns_N, return_inverse=True)
    best: tuple[int, tuple[int, Integers]] | None = None
    for segment_rows in SEGMENT_ROWS:
        segments = -(-len(counts_O) // (segment_rows or len(counts_O)))
        if segment_rows and (segments < 2 or segments**2 * len(used_U) > _MOST_COMPARISONS):
            continue
        segment_N = row_N // (segment_rows or len(counts_O))
        counts_GU = np.bincount(
            segment_N * len(used_U) + kind_N, minlength=segments * len(used_U)
        ).reshape(segments, len(used_U))
        cost, tracks_G = _deal(counts_GU, int(columns_N.size), columns)
        if best is None or cost < best[0]:
            best = cost, (segment_rows, tracks_G)
    assert best is not None
    return best[1]


def layers_that_share(columns: Sequence[Integers], widths: Sequence[int]) -> Integers:
    """1 for each layer whose columns are popular among the other layers of as many inputs, as those
    that read one residual stream are; else 0.
    """
    used = [np.unique(columns_N) for columns_N in columns]
    shares = np.zeros(len(used), np.int64)
    for width in set(widths):
        mine = [number for number, each in enumerate(widths) if each == width]
        met_I = np.bincount(np.concatenate([used[number] for number in mine]), minlength=width)
        for number in mine:
            others_I = met_I.copy()
            others_I[used[number]] -= 1
            odds_I = 1 + 2 * others_I
            bits = np.log2(odds_I.sum()) - np.log2(odds_I[used[number]])
            shares[number] = len(mine) > 1 and bits.sum() < len(used[number]) * np.log2(width)
    return shares


def _deal(counts_GU: Integers, values: int, columns: int) -> tuple[int, Integers]:
    """Each segment goes where it is cheapest, in order: (cost in 1/256 bit, track of each segment
    [G]).
    """
    label_cost = _COST_UNIT * (columns - 1).bit_length()
    tables = _cost_tables(values)
    tracks_MU = np.zeros((0, counts_GU.shape[1]), np.int64)
    dealt, total = [], 0
    for segment, counts_U in enumerate(counts_GU):
        alone = _cost_alone(counts_U, tables, label_cost)
        costs_M = np.append(_cost_in_track(tracks_MU, counts_U, label_cost), alone)
        choice = int(costs_M.argmin())
        total += int(costs_M[choice]) + (
            _COST_UNIT * segment.bit_length() if len(counts_GU) > 1 else 0
        )
        if choice == len(tracks_MU):
            tracks_MU = np.concatenate([tracks_MU, np.zeros_like(counts_U)[None]])
        tracks_MU[choice] += counts_U
        dealt.append(choice)
    return total, np.array(dealt)


def _cost_alone(
    counts_U: Integers, tables: tuple[Integers, Integers, Integers], label_cost: int
) -> int:
    """Cost of values that occur so often, whatever their order, in a track of their own."""
    again_N, new_N, total_N = tables
    kinds = int((counts_U > 0).sum())
    return int(
        total_N[counts_U.sum()] - again_N[counts_U].sum() - new_N[kinds] + label_cost * kinds
    )


def _cost_in_track(tracks_MU: Integers, counts_U: Integers, label_cost: int) -> Integers:
    """Cost [M] of the same values in tracks that have met others: their own counts, mixed with the
    track's odds.
    """
    used_U = counts_U > 0
    known_MU, count_U = tracks_MU[:, used_U], counts_U[used_U]
    new_MU = known_MU == 0
    kinds_M1 = (tracks_MU > 0).sum(axis=1, keepdims=True)
    new_odds_M1 = (CONCENTRATION + DISCOUNT * kinds_M1) / np.maximum(
        1, new_MU.sum(axis=1, keepdims=True)
    )
    odds_MU = np.where(new_MU, new_odds_M1, 16 * known_MU - DISCOUNT)
    prior_MU = TRACK_WEIGHT * odds_MU / (16 * tracks_MU.sum(axis=1, keepdims=True) + CONCENTRATION)
    bits_M = _log2_rising(np.array(float(TRACK_WEIGHT)), counts_U.sum()) - _log2_rising(
        prior_MU, count_U
    ).sum(axis=1)
    return np.rint(_COST_UNIT * bits_M).astype(np.int64) + label_cost * new_MU.sum(axis=1)


def _log2_rising(base: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.float64]:
    """log2 of base (base + 1) ... (base + count - 1), by Stirling's series from 8 on."""
    return _log2_gamma(base + count) - _log2_gamma(base)


def _log2_gamma(x: NDArray[np.float64]) -> NDArray[np.float64]:
    product = x * (x + 1) * (x + 2) * (x + 3) * (x + 4) * (x + 5) * (x + 6) * (x + 7)
    y = x + 8
    return (y - 0.5) * np.log2(y) - (y - 1 / (12 * y)) / np.log(2) - np.log2(product)


@functools.lru_cache(maxsize=64)
def _cost_tables(values: int) -> tuple[Integers, Integers, Integers]:
    """Sums of logarithms up to each count: of a kind's further values, of new kinds, of all odds
    together.
    """
    count_N = np.arange(values, dtype=np.int64)
    again_N = np.concatenate([[0, 0], _log(16 * count_N[1:] - DISCOUNT)]).cumsum()
    new_N = np.concatenate([[0], _log(CONCENTRATION + DISCOUNT * count_N)]).cumsum()
    total_N = np.concatenate([[0], _log(CONCENTRATION + 16 * count_N)]).cumsum()
    return again_N, new_N, total_N


def _log(numbers: NDArray[np.int64]) -> Integers:
    return np.rint(_COST_UNIT * np.log2(numbers)).astype(np.int64)
