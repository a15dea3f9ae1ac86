"""Where the selected connections sit: ascending flat indices into each layer's weight, seen as one
row-major [O, I] matrix.

    1 byte   0: plain, 1: coded
    plain    for each layer a byte, the bits of a row's count, or 0 if all rows keep equally many;
             the counts; the columns, row after row, at the fewest bits that fit
    coded    one stream of the range coder: whether all rows of a layer keep equally many, else
             their counts; the deal of rows to tracks (tracks.py); the columns (columns.py)

The writer keeps the smaller. Any selection can be stored: K of every neuron (counts cost nothing),
by layer, by network, or none of a row. The shapes (O, I, N) are not part of the stream.

Legend: O output neurons (rows), I inputs (columns), N connections of a layer, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import PackDamaged
from pipeline.packs.bits import MAX_WIDTH_BITS, pack_codes, packed_size_bytes, unpack_codes
from pipeline.packs.coder import Coder, Decoder, Encoder, Integers
from pipeline.packs.columns import Rows, code_columns
from pipeline.packs.tracks import SEGMENT_ROWS, choose_segments, code_segments, layers_that_share

PLAIN, CODED = b"\0", b"\1"
MAX_COLUMNS, MAX_ROWS = 1 << 22, 1 << 22
"""Most inputs of a neuron, and most neurons of all layers together, that a reader accepts."""


@dataclass(frozen=True)
class LayerShape:
    """A layer's neurons, inputs of a neuron, and selected connections."""

    rows: int
    columns: int
    count: int


def encode_positions(layers: Sequence[Integers], shapes: Sequence[LayerShape]) -> bytes:
    """Code each layer's indices [N], ascending. Raises PackDamaged for indices out of range, out of
    order, or twice.
    """
    for number, (index_N, shape) in enumerate(zip(layers, shapes, strict=True)):
        check_indices(index_N, shape, number)
    plain = PLAIN + b"".join(
        _plain(index_N, shape) for index_N, shape in zip(layers, shapes, strict=True)
    )
    try:
        coded = CODED + _coded(layers, shapes)
    except (
        PackDamaged
    ):  # more statistics than a reader would keep: such a selection has no columns in common
        return plain
    return min(plain, coded, key=len)


def largest_size_bytes(
    shapes: Sequence[LayerShape], *, equal_rows: bool, fixed_layers: bool
) -> int:
    """The most that `encode_positions` makes of any selection: its plain form.

    Args:
        equal_rows: the rows of a layer keep equally many connections.
        fixed_layers: each layer keeps as many as its shape says; otherwise that holds for all
            layers together only.
    """
    widest_bits = max(_column_bits(shape) for shape in shapes)
    total = len(PLAIN)
    for shape in shapes:
        most = min(shape.columns, shape.count) if fixed_layers else shape.columns
        counts = 0 if equal_rows else packed_size_bytes(shape.rows, most.bit_length())
        columns = packed_size_bytes(
            shape.count, _column_bits(shape) if fixed_layers else widest_bits
        )
        total += 1 + counts + columns + (not fixed_layers)
    return total


def decode_positions(data: bytes, shapes: Sequence[LayerShape]) -> list[Integers]:
    """The indices [N] of each layer, int64. Raises PackDamaged for data that are not such
    positions.
    """
    if (
        any(shape.columns > MAX_COLUMNS for shape in shapes)
        or sum(shape.rows for shape in shapes) > MAX_ROWS
    ):
        raise PackDamaged(
            f"positions: more than {MAX_COLUMNS} inputs in a layer, or {MAX_ROWS} neurons in all"
        )
    if not shapes or any(not 1 <= shape.count <= shape.rows * shape.columns for shape in shapes):
        raise PackDamaged("positions: a layer keeps no connection, or more than it has")
    if data[:1] not in (PLAIN, CODED):
        raise PackDamaged("positions: neither plain nor coded")
    layers = _read_plain(data[1:], shapes) if data[:1] == PLAIN else _read_coded(data[1:], shapes)
    for number, (index_N, shape) in enumerate(zip(layers, shapes, strict=True)):
        check_indices(index_N, shape, number)
    return layers


def check_indices(index_N: Integers, shape: LayerShape, layer: int) -> None:
    """Raises PackDamaged unless the indices are as many as the shape says, in range and strictly
    ascending; `layer` is named in the message.
    """
    if index_N.dtype != np.int64 or index_N.shape != (shape.count,):
        raise PackDamaged(
            f"positions of layer {layer}: expected int64 [{shape.count}], found {index_N.dtype}"
            f" {list(index_N.shape)}"
        )
    if (
        index_N.size
        and not 0 <= int(index_N.min()) <= int(index_N.max()) < shape.rows * shape.columns
    ):
        raise PackDamaged(
            f"positions of layer {layer}: indices {index_N.min()} to {index_N.max()}, the weight"
            f" has {shape.rows * shape.columns}"
        )
    if (index_N[1:] <= index_N[:-1]).any():
        at = int((index_N[1:] <= index_N[:-1]).argmax())
        raise PackDamaged(
            f"positions of layer {layer}: index {index_N[at + 1]} follows {index_N[at]}; they"
            " must ascend"
        )


# --- plain ----------------------------------------------------------------------------------------


def _plain(index_N: Integers, shape: LayerShape) -> bytes:
    counts_O = np.bincount(index_N // shape.columns, minlength=shape.rows)
    width_bits = 0 if (counts_O == counts_O[0]).all() else int(counts_O.max()).bit_length()
    counts = pack_codes(counts_O, width_bits) if width_bits else b""
    return bytes([width_bits]) + counts + pack_codes(index_N % shape.columns, _column_bits(shape))


def _read_plain(data: bytes, shapes: Sequence[LayerShape]) -> list[Integers]:
    layers, start = [], 0
    for number, shape in enumerate(shapes):
        width_bits = data[start] if start < len(data) else 0
        if width_bits > MAX_WIDTH_BITS or (width_bits == 0 and shape.count % shape.rows):
            raise PackDamaged(f"positions of layer {number}: rows' counts of {width_bits} bits")
        middle = start + 1 + packed_size_bytes(shape.rows, width_bits)
        stop = middle + packed_size_bytes(shape.count, _column_bits(shape))
        if stop > len(data):
            raise PackDamaged(f"positions: {len(data)} bytes end within layer {number}")
        counts_O = np.full(shape.rows, shape.count // shape.rows, np.int64)
        if width_bits:
            counts_O = unpack_codes(data[start + 1 : middle], shape.rows, width_bits).astype(
                np.int64
            )
        columns_N = unpack_codes(data[middle:stop], shape.count, _column_bits(shape)).astype(
            np.int64
        )
        layers.append(_places(counts_O, columns_N, shape, number))
        start = stop
    if start != len(data):
        raise PackDamaged(f"positions: {len(data) - start} bytes after the last layer")
    return layers


def _column_bits(shape: LayerShape) -> int:
    return max(1, (shape.columns - 1).bit_length())


def _places(counts_O: Integers, columns_N: Integers, shape: LayerShape, number: int) -> Integers:
    if int(counts_O.sum()) != shape.count or int(columns_N.max()) >= shape.columns:
        raise PackDamaged(
            f"positions of layer {number}: rows of {counts_O.sum()} connections, columns to"
            f" {columns_N.max()}; the layer is {shape}"
        )
    return np.sort(np.repeat(np.arange(shape.rows), counts_O) * shape.columns + columns_N)


# --- coded ----------------------------------------------------------------------------------------


def _coded(layers: Sequence[Integers], shapes: Sequence[LayerShape]) -> bytes:
    encoder = Encoder()
    _code(encoder, shapes, layers)
    return encoder.to_bytes()


def _read_coded(data: bytes, shapes: Sequence[LayerShape]) -> list[Integers]:
    decoder = Decoder(data)
    layers = _code(decoder, shapes, None)
    decoder.check_end()
    return layers


def _code(
    coder: Coder, shapes: Sequence[LayerShape], layers: Sequence[Integers] | None
) -> list[Integers]:
    """The stream, written once for both directions."""
    columns = (
        None
        if layers is None
        else [index_N % shape.columns for index_N, shape in zip(layers, shapes, strict=True)]
    )
    given = (
        None
        if layers is None
        else [
            np.bincount(each // shape.columns, minlength=shape.rows)
            for each, shape in zip(layers, shapes, strict=True)
        ]
    )
    counts = _code_counts(coder, shapes, given)
    rows = _code_tracks(coder, shapes, counts, columns)
    columns_N = code_columns(coder, rows, None if columns is None else np.concatenate(columns))
    stops = np.cumsum([shape.count for shape in shapes])[:-1]
    pieces = np.split(columns_N, stops)
    return [
        _places(counts_O, piece_N, shape, 0)
        for counts_O, piece_N, shape in zip(counts, pieces, shapes, strict=True)
    ]


def _code_counts(
    coder: Coder, shapes: Sequence[LayerShape], given: Sequence[Integers] | None
) -> list[Integers]:
    """Connections of each row [O] of each layer: nothing but a flag where a layer's rows have
    equally many, in every layer.
    """
    equal = [np.full(shape.rows, shape.count // shape.rows) for shape in shapes]
    all_equal = (
        None
        if given is None
        else np.array(
            [all(np.array_equal(*pair) for pair in zip(equal, given, strict=True))], np.int64
        )
    )
    if coder.uniform(np.array([2]), all_equal)[0]:
        counts = equal
    else:
        counts = [
            _code_unequal(coder, shape, None if given is None else given[number])
            for number, shape in enumerate(shapes)
        ]
    for number, (counts_O, shape) in enumerate(zip(counts, shapes, strict=True)):
        if int(counts_O.sum()) != shape.count or int(counts_O.max()) > shape.columns:
            raise PackDamaged(
                f"positions of layer {number}: rows of {counts_O.sum()} connections; the layer is"
                f" {shape}"
            )
    return counts


def _code_unequal(coder: Coder, shape: LayerShape, given_O: Integers | None) -> Integers:
    """The most that a row keeps, then every row's count [O] at odds learnt on the way."""
    most = (
        int(
            coder.uniform(
                np.array([shape.columns]),
                None if given_O is None else given_O.max(keepdims=True) - 1,
            )[0]
        )
        + 1
    )
    seen_A = np.zeros(most + 1, np.int64)
    counts_O = np.zeros(shape.rows, np.int64)
    start = 0
    while start < shape.rows:
        stop = min(shape.rows, start + max(1, start // 4))
        odds_A = 16 * seen_A + 1 + 32 // (1 + np.arange(most + 1))
        block = coder.categorical(
            odds_A[None],
            np.zeros(stop - start, np.int64),
            None if given_O is None else given_O[start:stop],
        )
        counts_O[start:stop] = block
        seen_A += np.bincount(block, minlength=most + 1)
        start = stop
    return counts_O


def _code_tracks(
    coder: Coder,
    shapes: Sequence[LayerShape],
    counts: Sequence[Integers],
    columns: Sequence[Integers] | None,
) -> Rows:
    track_G: list[Integers] = []
    within_G: list[Integers] = []
    segment_rows_T: list[int] = []
    columns_T: list[int] = []
    shares_T: list[int] = []
    layer_shares: list[int] = []
    segment_odds_A = np.ones(len(SEGMENT_ROWS), np.int64)
    sharing = (
        None if columns is None else layers_that_share(columns, [shape.columns for shape in shapes])
    )
    for number, (shape, counts_O) in enumerate(zip(shapes, counts, strict=True)):
        choice = (
            None if columns is None else choose_segments(counts_O, columns[number], shape.columns)
        )
        sharing_odds = np.array([[number - sum(layer_shares) + 1, sum(layer_shares) + 1]])
        shares = coder.categorical(
            sharing_odds,
            np.zeros(1, np.int64),
            None if sharing is None else sharing[number : number + 1],
        )
        layer_shares.append(int(shares[0]))
        segment_rows, deal_G = code_segments(coder, shape.rows, segment_odds_A, choice)
        row_O = np.arange(shape.rows)
        track_G.append(
            len(columns_T)
            + (deal_G[row_O // segment_rows] if segment_rows else np.zeros(shape.rows, np.int64))
        )
        within_G.append(row_O % segment_rows if segment_rows else row_O)
        tracks = int(deal_G.max()) + 1
        segment_rows_T += [segment_rows] * tracks
        columns_T += [shape.columns] * tracks
        shares_T += [int(shares[0])] * tracks
    by_track = (np.array(each, np.int64) for each in (segment_rows_T, columns_T, shares_T))
    return Rows(
        np.concatenate(track_G), np.concatenate(within_G), np.concatenate(counts), *by_track
    )
