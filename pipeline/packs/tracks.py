"""Which rows of a layer share one column model: heads that read alike are told together, others apart.

A layer's rows are cut into segments: the whole layer, or runs of 64 or 32 rows, the usual widths of attention heads. Segments are dealt to tracks,
and each track learns its own column statistics. In a pretrained ViT the query and value heads choose among few columns of the residual stream and
every key head among others, so a layer's columns cost a sixth less than under one model. The encoder deals greedily, by what a segment would cost
in each track under the model of `columns.py`; the deal itself is coded.

Legend: G segments of a layer, U distinct columns chosen in a layer, M tracks of a layer, O rows.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from pipeline.packs.coder import Coder, Integers

SEGMENT_ROWS = (0, 64, 32)
"""Rows of a segment, by the number that the file gives; 0 is the whole layer."""
DISCOUNT, CONCENTRATION = 6, 24
"""Pitman-Yor's parameters in sixteenths: with n values of U kinds seen, kind c follows at odds 16 n[c] - 6, a new kind at odds 24 + 6 U."""
_MOST_COMPARISONS = 1 << 26  # of a segment with a track, column by column; beyond, a layer is one track
_COST_UNIT = 256  # costs are whole numbers of 1/256 bit, so that no machine deals differently


def code_segments(coder: Coder, rows: int, choice: tuple[int, Integers] | None) -> tuple[int, Integers]:
    """Rows of a segment, and each segment's track [G]. `choice` is what an encoder writes."""
    number = coder.uniform(np.array([len(SEGMENT_ROWS)]), None if choice is None else np.array([SEGMENT_ROWS.index(choice[0])]))
    segment_rows = SEGMENT_ROWS[int(number[0])]
    if segment_rows == 0:
        return 0, np.zeros(1, np.int64)
    tracks: list[int] = []
    sizes: list[int] = []
    for segment in range(-(-rows // segment_rows)):
        given = None if choice is None else choice[1][segment : segment + 1]
        track = int(coder.categorical(np.array([[*sizes, 1]]), np.zeros(1, np.int64), given)[0]) if sizes else 0
        if track >= len(sizes):
            track = len(sizes)
            sizes.append(0)
        sizes[track] += 1
        tracks.append(track)
    return segment_rows, np.array(tracks)


def choose_segments(counts_O: Integers, columns_N: Integers, columns: int) -> tuple[int, Integers]:
    """The cheapest deal of a layer's rows, which keep `counts_O` connections each at `columns_N`, row after row."""
    row_N = np.repeat(np.arange(len(counts_O)), counts_O)
    used_U, kind_N = np.unique(columns_N, return_inverse=True)
    best: tuple[int, tuple[int, Integers]] | None = None
    for segment_rows in SEGMENT_ROWS:
        segments = -(-len(counts_O) // (segment_rows or len(counts_O)))
        if segment_rows and (segments < 2 or segments**2 * len(used_U) > _MOST_COMPARISONS):
            continue
        segment_N = row_N // (segment_rows or len(counts_O))
        counts_GU = np.bincount(segment_N * len(used_U) + kind_N, minlength=segments * len(used_U)).reshape(segments, len(used_U))
        cost, tracks_G = _deal(counts_GU, int(columns_N.size), columns)
        if best is None or cost < best[0]:
            best = cost, (segment_rows, tracks_G)
    assert best is not None
    return best[1]


def _deal(counts_GU: Integers, values: int, columns: int) -> tuple[int, Integers]:
    """Each segment goes where it is cheapest, in order: (cost in 1/256 bit, track of each segment [G])."""
    label_cost = _COST_UNIT * (columns - 1).bit_length()
    tables = _cost_tables(values)
    tracks_MU = np.zeros((0, counts_GU.shape[1]), np.int64)
    dealt, total = [], 0
    for segment, counts_U in enumerate(counts_GU):
        candidates_MU = np.concatenate([tracks_MU, np.zeros_like(counts_U)[None]])
        extra_M = _cost(candidates_MU + counts_U, tables, label_cost) - _cost(candidates_MU, tables, label_cost)
        choice = int(extra_M.argmin())
        total += int(extra_M[choice]) + (_COST_UNIT * segment.bit_length() if len(counts_GU) > 1 else 0)
        tracks_MU = candidates_MU if choice == len(tracks_MU) else tracks_MU
        tracks_MU[choice] += counts_U
        dealt.append(choice)
    return total, np.array(dealt)


def _cost(counts_MU: Integers, tables: tuple[Integers, Integers, Integers], label_cost: int) -> Integers:
    """Cost [M] of values that occur so often, whatever their order."""
    again_N, new_N, total_N = tables
    kinds_M = (counts_MU > 0).sum(axis=1)
    return total_N[counts_MU.sum(axis=1)] - again_N[counts_MU].sum(axis=1) - new_N[kinds_M] + label_cost * kinds_M


@functools.lru_cache(maxsize=64)
def _cost_tables(values: int) -> tuple[Integers, Integers, Integers]:
    """Sums of logarithms up to each count: of a kind's further values, of new kinds, of all odds together."""
    count_N = np.arange(values, dtype=np.int64)
    again_N = np.concatenate([[0, 0], _log(16 * count_N[1:] - DISCOUNT)]).cumsum()
    new_N = np.concatenate([[0], _log(CONCENTRATION + DISCOUNT * count_N)]).cumsum()
    total_N = np.concatenate([[0], _log(CONCENTRATION + 16 * count_N)]).cumsum()
    return again_N, new_N, total_N


def _log(numbers: NDArray[np.int64]) -> Integers:
    return np.rint(_COST_UNIT * np.log2(numbers)).astype(np.int64)
