"""Where the selected connections sit: the input column of each of a neuron's K connections, at a fixed width per layer.

A layer with `columns` inputs spends ceil(log2(columns)) bits on a position, row by row, and starts on a byte of its own. The order within a row is
kept, because value k of a row belongs to position k.

Legend: O output neurons (rows), K connections kept per neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PackDamaged
from pipeline.packs.bits import pack_codes, packed_size_bytes, unpack_codes

LayerShape = tuple[int, int, int]  # rows, top_k, columns


def positions_size_bytes(shapes: Sequence[LayerShape]) -> int:
    """Bytes that the positions of layers of these (rows, top_k, columns) take."""
    return sum(_layer_size_bytes(shape) for shape in shapes)


def encode_positions(layers: Sequence[tuple[NDArray[Any], int]]) -> bytes:
    """Code each layer's (index [O, K], number of columns). Raises PackDamaged for a column out of range or twice in a row."""
    chunks = []
    for layer, (index_OK, columns) in enumerate(layers):
        check_positions(index_OK, columns, layer)
        chunks.append(pack_codes(index_OK, _width_bits(columns)))
    return b"".join(chunks)


def decode_positions(data: bytes, shapes: Sequence[LayerShape]) -> list[NDArray[np.int32]]:
    """The index [O, K] of each layer. Raises PackDamaged for a wrong length, a column out of range or twice in a row."""
    if len(data) != positions_size_bytes(shapes):
        raise PackDamaged(f"the positions take {positions_size_bytes(shapes)} bytes; found {len(data)}")
    layers, start = [], 0
    for layer, (rows, top_k, columns) in enumerate(shapes):
        stop = start + _layer_size_bytes((rows, top_k, columns))
        codes = unpack_codes(data[start:stop], rows * top_k, _width_bits(columns))
        # checked while unsigned: 32-bit codes would wrap to negative columns
        check_positions(codes.reshape(rows, top_k), columns, layer)
        layers.append(codes.astype(np.int32).reshape(rows, top_k))
        start = stop
    return layers


def check_positions(index_OK: NDArray[Any], columns: int, layer: int) -> None:
    """Raises PackDamaged unless every row names distinct columns within range; `layer` is the number the message gives."""
    if index_OK.ndim != 2 or not np.issubdtype(index_OK.dtype, np.integer):
        raise PackDamaged(f"positions of layer {layer}: expected integers [rows, top_k], found {index_OK.dtype} {list(index_OK.shape)}")
    if index_OK.size and not 0 <= int(index_OK.min()) <= int(index_OK.max()) < columns:
        raise PackDamaged(f"positions of layer {layer}: columns {index_OK.min()} to {index_OK.max()}, but the layer has {columns}")
    sorted_OK = np.sort(index_OK, axis=1)
    repeated_O = (sorted_OK[:, 1:] == sorted_OK[:, :-1]).any(axis=1)
    if repeated_O.any():
        raise PackDamaged(f"positions of layer {layer}: row {int(repeated_O.argmax())} names a column twice")


def _layer_size_bytes(shape: LayerShape) -> int:
    rows, top_k, columns = shape
    return packed_size_bytes(rows * top_k, _width_bits(columns))


def _width_bits(columns: int) -> int:
    # one bit even where there is nothing to say: otherwise a few bytes could claim any number of rows
    return max(1, (columns - 1).bit_length())
