"""The column model: which inputs a layer's neurons choose, learnt while decoding, so that no model
is stored.

Each track of rows (tracks.py) numbers the columns it has met in the order in which it met them. A
row chooses known numbers, or "new" (number 0), and a new column is then named outright. Odds follow
Pitman and Yor: a column met n times at 16 n - 5, a new one at 20 + 5 U after U kinds; within a
segment after the first, the segment's own counts are mixed with the track's. Rows come in blocks
that grow with what has been learnt, and counts change only between blocks; all tracks of all layers
take their i-th block together. So a pack of a hundred thousand connections is some hundred calls of
the coder, and the growing blocks cost half a percent against learning from every value.

A row's K columns are a set, and its order costs nothing: numbers are coded ascending, the new
columns last, at the odds of the least of r draws,

    P(next = c | r to come, all > previous)  ~  w[c] * (sum of w[c'] over c' > c)^(r - 1).

All odds are whole numbers, and powers are fixed-point products: every machine decodes the same
columns.

Legend: G rows of all layers, N values, T tracks, M tracks that take part in a step, R rows in a
step, A numbers (0 is "new"), K most in a row, Q distinct tables of a call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline.errors import PackDamaged
from pipeline.packs.coder import Coder, Integers, share
from pipeline.packs.tracks import CONCENTRATION, DISCOUNT, TRACK_WEIGHT

_OWN_WEIGHT_BITS = 16
_STAGE_BITS, _POWER_BITS = 17, 20
_CALL_ODDS = 1 << 13  # what one call of the coder is worth in odds computed
_MOST_POPULAR = 1 << 10
_NONE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Rows:
    """All rows of all layers, in order: their track, place within their segment, and number of
    connections.

    A track has `columns_T` columns; where `shares_T` is 1, it names new columns by their popularity
    among all such tracks of as many columns.
    """

    track_G: Integers
    within_G: Integers
    counts_G: Integers
    segment_rows_T: Integers
    columns_T: Integers
    shares_T: Integers


@dataclass(frozen=True)
class _Step:
    """One block of each of M tracks."""

    tracks_M: Integers
    kinds_M: Integers
    rows_R: Integers
    owner_R: Integers
    counts_R: Integers

    @property
    def most(self) -> int:
        """K: the most connections of any row."""
        return int(self.counts_R.max())


@dataclass
class _Statistics:
    """What the tracks have learnt: counts of each number in the track and in its current segment,
    and the column of each number.
    """

    tracks: int
    values: int
    kinds_T: Integers = field(init=False)
    track_TA: Integers = field(init=False)
    segment_TA: Integers = field(init=False)
    column_TA: Integers = field(init=False)

    def __post_init__(self) -> None:
        self.kinds_T = np.zeros(self.tracks, np.int64)
        self.track_TA, self.segment_TA, self.column_TA = (
            np.zeros((self.tracks, 8), np.int64) for _ in range(3)
        )

    def make_room(self, numbers: int) -> None:
        """Columns for `numbers` numbers in every track."""
        width = self.track_TA.shape[1]
        if numbers <= width:
            return
        wider = max(numbers, 2 * width)
        if self.tracks * wider > max_cells(self.values):
            raise PackDamaged(
                f"{self.tracks} column models of {wider} columns are more than {self.values}"
                " connections need"
            )
        pad = ((0, 0), (0, wider - width))
        self.track_TA, self.segment_TA, self.column_TA = (
            np.pad(each, pad) for each in (self.track_TA, self.segment_TA, self.column_TA)
        )


def max_cells(values: int) -> int:
    """Most counts that a reader stores: a file that claims more is refused, so memory stays
    proportional to the file.
    """
    return (1 << 20) + 64 * values


def max_work(values: int) -> int:
    """Most odds that a reader computes: about a hundred times what real selections take."""
    return (1 << 27) + 1024 * values


def code_columns(coder: Coder, rows: Rows, columns_N: Integers | None) -> Integers:
    """The columns [N] of every row, row after row, in no order within a row; an encoder gives them
    ascending within each row.

    Raises PackDamaged where the work would be out of proportion; an encoder then has to choose
    another form.
    """
    return _Walk(coder, rows, columns_N).run()


class _Walk:
    """One pass over all rows, the same for an encoder, which knows the columns, and a decoder,
    which finds them.
    """

    def __init__(self, coder: Coder, rows: Rows, columns_N: Integers | None) -> None:
        self.coder, self.rows, self.truth_N = coder, rows, columns_N
        self.order_G = np.argsort(rows.track_G, kind="stable")
        self.first_value_G = rows.counts_G.cumsum() - rows.counts_G
        self.values = int(rows.counts_G.sum())
        self.statistics = _Statistics(len(rows.columns_T), self.values)
        self.columns_N = np.zeros(self.values, np.int64)
        self.popular = {
            int(width): np.zeros(width, np.int64) for width in np.unique(rows.columns_T)
        }
        self.work = 0
        self.number_N = None if columns_N is None else self._numbers(columns_N)

    def run(self) -> Integers:
        """All columns [N]."""
        lengths_T = np.bincount(self.rows.track_G, minlength=len(self.rows.columns_T))
        start_T = lengths_T.cumsum() - lengths_T
        for tracks_M, from_M, to_M in _blocks_together(lengths_T, self.rows.segment_rows_T):
            rows_R = self.order_G[runs(start_T[tracks_M] + from_M, to_M - from_M)]
            owner_R = np.repeat(np.arange(len(tracks_M)), to_M - from_M)
            step = _Step(
                tracks_M,
                self.statistics.kinds_T[tracks_M],
                rows_R,
                owner_R,
                self.rows.counts_G[rows_R],
            )
            within_M = self.rows.within_G[self.order_G[start_T[tracks_M] + from_M]]
            self.statistics.segment_TA[tracks_M[within_M == 0]] = 0
            self._code(step, self._weights(step, mixed_M=from_M > within_M))
        return self.columns_N

    def _code(self, step: _Step, weights_MA: Integers) -> None:
        if step.most:
            numbers_RK = self._code_numbers(step, weights_MA)
            self._code_new(step, numbers_RK)
            self._learn(step, numbers_RK)

    def _weights(self, step: _Step, mixed_M: Integers) -> Integers:
        """Odds [M, A] of each number in this block of each track."""
        width = int(step.kinds_M.max()) + 1
        counts_MA = self.statistics.track_TA[step.tracks_M, :width]
        odds_MA = 16 * counts_MA - DISCOUNT * (counts_MA > 0)
        odds_MA[:, 0] = CONCENTRATION + DISCOUNT * step.kinds_M
        odds_MA = TRACK_WEIGHT * share(odds_MA, 1 << _OWN_WEIGHT_BITS)
        return odds_MA + np.where(
            mixed_M[:, None],
            self.statistics.segment_TA[step.tracks_M, :width] << _OWN_WEIGHT_BITS,
            0,
        )

    # --- known numbers ---------------------------------------------------------------------------

    def _code_numbers(self, step: _Step, weights_MA: Integers) -> Integers:
        """Each row's known numbers [R, K], ascending; 0 where a column is new, or a row has no
        more.
        """
        truth_RK = None if self.number_N is None else self._known(step)
        numbers_RK = np.zeros((len(step.rows_R), step.most), np.int64)
        if step.most > 1:
            valid_MA = np.arange(weights_MA.shape[1]) <= step.kinds_M[:, None]
            weights_MA = share(weights_MA, (1 << _STAGE_BITS) - weights_MA.shape[1]) + valid_MA
        open_R = np.nonzero(step.counts_R)[0]
        for stage in range(step.most):
            if not len(open_R):
                break
            self._spend(_CALL_ODDS + len(open_R) * weights_MA.shape[1])
            tables_QA, table_R = weights_MA, step.owner_R[open_R]
            if step.most > 1:
                previous_R = (
                    numbers_RK[open_R, stage - 1] if stage else np.zeros(len(open_R), np.int64)
                )
                tables_QA, table_R = _tables_of_least(
                    weights_MA, table_R, step.counts_R[open_R] - stage, previous_R
                )
            chosen_R = self.coder.categorical(
                tables_QA, table_R, None if truth_RK is None else truth_RK[open_R, stage]
            )
            numbers_RK[open_R, stage] = chosen_R
            open_R = open_R[(chosen_R > 0) & (step.counts_R[open_R] > stage + 1)]
        return numbers_RK

    def _known(self, step: _Step) -> Integers:
        """Encoder only: the known column numbers that `_code_numbers` writes, [R, K]."""
        assert self.number_N is not None
        index_RK = self.first_value_G[step.rows_R][:, None] + np.arange(step.most)
        is_there_RK = np.arange(step.most) < step.counts_R[:, None]
        numbers_RK = self.number_N[np.where(is_there_RK, index_RK, 0)]
        known_RK = is_there_RK & (numbers_RK <= step.kinds_M[step.owner_R][:, None])
        sorted_RK = np.sort(np.where(known_RK, numbers_RK, _NONE), axis=1)
        return np.where(sorted_RK == _NONE, 0, sorted_RK)

    def _numbers(self, columns_N: Integers) -> Integers:
        """Every value's number in its track: the rank of its column's first appearance."""
        counts_G = self.rows.counts_G[self.order_G]
        values_N = runs(self.first_value_G[self.order_G], counts_G)
        track_N = np.repeat(self.rows.track_G[self.order_G], counts_G)
        numbers_N = np.zeros(self.values, np.int64)
        numbers_N[values_N] = ranks_of_first(track_N, columns_N[values_N])
        return numbers_N

    # --- new columns -----------------------------------------------------------------------------

    def _code_new(self, step: _Step, numbers_RK: Integers) -> None:
        """Name the columns that rows chose and their tracks have not met, give them numbers, and
        write those into `numbers_RK`.
        """
        new_R = step.counts_R - (numbers_RK > 0).sum(axis=1)
        owner_E = np.repeat(step.owner_R, new_R)
        row_E = np.repeat(np.arange(len(step.rows_R)), new_R)
        truth_E = None
        if self.truth_N is not None and self.number_N is not None:
            values_N = runs(self.first_value_G[step.rows_R], step.counts_R)
            truth_E = self.truth_N[
                values_N[
                    self.number_N[values_N] > np.repeat(step.kinds_M[step.owner_R], step.counts_R)
                ]
            ]
        columns_E = self._name_columns(step.tracks_M[owner_E], truth_E)
        numbers_E = ranks_of_first(owner_E, columns_E) + step.kinds_M[owner_E]
        if len(numbers_E):
            self.statistics.make_room(int(numbers_E.max()) + 1)
        self.statistics.column_TA[step.tracks_M[owner_E], numbers_E] = columns_E
        first_E = numbers_E > _running_maximum(owner_E, numbers_E)
        self._note_popular(step.tracks_M[owner_E[first_E]], columns_E[first_E])
        np.maximum.at(self.statistics.kinds_T, step.tracks_M[owner_E], numbers_E)
        slot_E = (
            (step.counts_R - new_R)[row_E]
            + np.arange(len(row_E))
            - np.repeat(new_R.cumsum() - new_R, new_R)
        )
        numbers_RK[row_E, slot_E] = numbers_E

    def _name_columns(self, track_E: Integers, truth_E: Integers | None) -> Integers:
        """Columns that tracks have not met, at odds 1 + 2 n after n tracks that share with them
        have met one.
        """
        columns_E = np.zeros(len(track_E), np.int64)
        width_E = self.rows.columns_T[track_E]
        for width in np.unique(width_E):
            mine_E = width_E == width
            tracks_Q, table_E = np.unique(track_E[mine_E], return_inverse=True)
            odds_QI = self._odds_of_unmet(tracks_Q, int(width))
            columns_E[mine_E] = self.coder.categorical(
                odds_QI, table_E, None if truth_E is None else truth_E[mine_E]
            )
        return columns_E

    def _odds_of_unmet(self, tracks_Q: Integers, width: int) -> Integers:
        self._spend(len(tracks_Q) * width)
        shared_I = 1 + 2 * np.minimum(self.popular[width], _MOST_POPULAR)
        odds_QI = np.where(self.rows.shares_T[tracks_Q, None] > 0, shared_I, 1)
        kinds_Q = self.statistics.kinds_T[tracks_Q]
        met_N = self.statistics.column_TA[
            np.repeat(tracks_Q, kinds_Q), runs(np.ones_like(kinds_Q), kinds_Q)
        ]
        odds_QI[np.repeat(np.arange(len(tracks_Q)), kinds_Q), met_N] = 0
        odds_QI[odds_QI.sum(axis=1) == 0] = 1  # no writer names a column where all are met
        return odds_QI

    def _note_popular(self, track_E: Integers, columns_E: Integers) -> None:
        for width, popular_I in self.popular.items():
            mine_E = (self.rows.shares_T[track_E] > 0) & (self.rows.columns_T[track_E] == width)
            np.add.at(popular_I, columns_E[mine_E], 1)

    def _learn(self, step: _Step, numbers_RK: Integers) -> None:
        """Note the columns that the rows chose, and count them."""
        track_N = np.repeat(step.tracks_M[step.owner_R], step.counts_R)
        number_N = numbers_RK[np.arange(step.most) < step.counts_R[:, None]]
        self.columns_N[runs(self.first_value_G[step.rows_R], step.counts_R)] = (
            self.statistics.column_TA[track_N, number_N]
        )
        for counts_TA in (self.statistics.track_TA, self.statistics.segment_TA):
            np.add.at(counts_TA, (track_N, number_N), 1)

    def _spend(self, odds: int) -> None:
        self.work += odds
        if self.work > max_work(self.values):
            raise PackDamaged(
                f"the column models of {self.values} connections ask for more than"
                f" {max_work(self.values)} odds"
            )


def _tables_of_least(
    weights_MA: Integers, owner_R: Integers, remaining_R: Integers, previous_R: Integers
) -> tuple[Integers, Integers]:
    """Odds [Q, A] of the least of `remaining` numbers above `previous`, and which of them each row
    takes [R].
    """
    keys_R3 = np.stack([owner_R, remaining_R, previous_R], axis=1)
    keys_Q3, table_R = np.unique(keys_R3, axis=0, return_inverse=True)
    owner_Q, remaining_Q, previous_Q = keys_Q3.T
    number_A = np.arange(weights_MA.shape[1])
    weights_QA = np.where(
        (number_A > previous_Q[:, None]) | (number_A == 0), weights_MA[owner_Q], 0
    )
    total_Q1 = weights_QA.sum(axis=1, keepdims=True)
    # "new" stands at 0, but comes after all known numbers: all that remain are then new
    after_QA = total_Q1 - weights_QA.cumsum(axis=1) + weights_QA[:, :1]
    after_QA[:, 0] = weights_QA[:, 0]
    power_QA = _power((after_QA << _POWER_BITS) // total_Q1, remaining_Q - 1)
    return weights_QA * power_QA + (weights_QA > 0), table_R.reshape(-1)


def _power(base_QA: Integers, exponent_Q: Integers) -> Integers:
    """base^exponent, both in units of 2^-20, by squaring."""
    result_QA = np.full_like(base_QA, 1 << _POWER_BITS)
    while exponent_Q.any():
        odd_Q1 = (exponent_Q & 1).astype(bool)[:, None]
        result_QA = np.where(odd_Q1, result_QA * base_QA >> _POWER_BITS, result_QA)
        base_QA = base_QA * base_QA >> _POWER_BITS
        exponent_Q = exponent_Q >> 1
    return result_QA


def _blocks_together(
    lengths_T: Integers, segment_rows_T: Integers
) -> Iterator[tuple[Integers, Integers, Integers]]:
    """For each number of a block the tracks [M] that have so many, and from which of their rows to
    which it goes [M].
    """
    bounds = [
        block_bounds(*each)
        for each in zip(lengths_T.tolist(), segment_rows_T.tolist(), strict=True)
    ]
    blocks_T = np.array([len(each) - 1 for each in bounds])
    number_B = runs(np.zeros_like(blocks_T), blocks_T)
    by_number_B = np.argsort(number_B, kind="stable")
    track_B = np.repeat(np.arange(len(bounds)), blocks_T)
    from_B, to_B = (
        np.concatenate([each[side] for each in bounds])
        for side in (slice(None, -1), slice(1, None))
    )
    stops = np.bincount(number_B).cumsum()[:-1]
    return zip(
        *(np.split(each_B[by_number_B], stops) for each_B in (track_B, from_B, to_B)), strict=True
    )


@functools.lru_cache(maxsize=64)
def block_bounds(rows: int, segment_rows: int) -> Integers:
    """Where a track's blocks begin and end: a twentieth of the rows seen, less at the start of a
    segment, never across segments.
    """
    bounds = [0]
    while bounds[-1] < rows:
        seen = bounds[-1]
        within = seen % segment_rows if segment_rows else seen
        step = max(1, min(seen // 20, 1 + within // 5))
        bounds.append(
            min(rows, seen + step, seen - within + segment_rows if segment_rows else rows)
        )
    return np.array(bounds)


def runs(start_R: Integers, length_R: Integers) -> Integers:
    """start, start + 1, ... for each run, one after the other."""
    before_R = length_R.cumsum() - length_R
    return np.arange(int(length_R.sum())) + np.repeat(start_R - before_R, length_R)


def _running_maximum(group_N: Integers, number_N: Integers) -> Integers:
    """For each value the largest number before it in its group, 0 for the first; groups come one
    after the other, numbers are positive.
    """
    offset_N = group_N << 40
    before_N = (
        np.maximum.accumulate(np.concatenate([[-1], (offset_N + number_N)[:-1]]))
        if len(group_N)
        else group_N
    )
    return np.maximum(before_N - offset_N, 0)


def ranks_of_first(group_N: Integers, kind_N: Integers) -> Integers:
    """For each value the rank, from 1, of its kind's first appearance within its group; groups come
    one after the other.
    """
    kinds = int(kind_N.max()) + 1 if len(kind_N) else 1
    _, first_Q, kind_of_N = np.unique(
        group_N * kinds + kind_N, return_index=True, return_inverse=True
    )
    in_order_Q = np.argsort(first_Q)
    group_Q = group_N[first_Q[in_order_Q]]
    rank_Q = np.zeros(len(first_Q), np.int64)
    rank_Q[in_order_Q] = np.arange(1, len(first_Q) + 1) - np.searchsorted(group_Q, group_Q)
    return rank_Q[kind_of_N]
