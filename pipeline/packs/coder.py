"""The entropy coder: integers in, bytes out, under models made of integers only.

Encoder and Decoder offer the same two calls, so that a format is written once: the encoder is given
the symbols and returns them, the decoder ignores what it is given and returns what it read. The
coder is constriction's range coder (24-bit probabilities).

constriction takes a distribution over A symbols as floats p and gives symbol a the frequency 1 +
floor(...) of 2^24, by one sum, one quotient, and one product a symbol. Here p are whole numbers
that add up to exactly 2^24 - A: below 2^24, float32 adds and multiplies them exactly, the quotient
is exactly 1, and the frequencies are exactly 1 + p. No rounding happens anywhere, so every machine
decodes the same symbols.

Legend: R symbols coded in one call, A size of the alphabet, T tables.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PackDamaged

PRECISION_BITS = 24
MAX_WEIGHT_BITS = 38
"""Largest sum of a row of weights; its product with 2^24 must fit 63 bits."""
_WORD_BYTES = 4
_CODER_BYTES = 8
"""Bytes that the coder may take beyond the symbols' information, for its state."""
_ROWS_AT_ONCE_CELLS = 1 << 22
_WIDE_TABLE = 256
"""Number of symbols above which a table is divided row by row."""

Integers = NDArray[np.int64]


class Coder(Protocol):
    """The interface that encoder and decoder share."""

    def uniform(self, sizes_R: Integers, symbols_R: Integers | None) -> Integers:
        """Symbols [R] below `sizes_R`, each at equal odds; a size of 1 takes no space."""

    def categorical(
        self, weights_TA: Integers, table_R: Integers, symbols_R: Integers | None
    ) -> Integers:
        """Symbols [R], symbol r at odds `weights_TA[table_R[r]]`; a weight of 0 is possible, but
        costs 24 bits.
        """


class Encoder:
    """Symbols to bytes."""

    def __init__(self) -> None:
        self._coder = _constriction().queue.RangeEncoder()

    def uniform(self, sizes_R: Integers, symbols_R: Integers | None) -> Integers:
        """See Coder."""
        assert symbols_R is not None
        some_R = sizes_R > 1
        if some_R.any():
            self._coder.encode(
                symbols_R[some_R].astype(np.int32), _uniform(), sizes_R[some_R].astype(np.int32)
            )
        return symbols_R

    def categorical(
        self, weights_TA: Integers, table_R: Integers, symbols_R: Integers | None
    ) -> Integers:
        """See Coder."""
        assert symbols_R is not None
        tables_TA = _tables(weights_TA)
        for rows in _chunks(table_R, tables_TA.shape[1]):
            self._coder.encode(
                symbols_R[rows].astype(np.int32), _categorical(), tables_TA[table_R[rows]]
            )
        return symbols_R

    def to_bytes(self) -> bytes:
        """All that was coded, words most significant byte first. Zeros at the end are left out; a
        decoder takes what is missing for zeros.
        """
        words = self._coder.get_compressed()
        written, (lower, span) = self._coder.pos()
        if len(words) == written + 1 and lower + (1 << 32) <= 1 << 64:  # no carry is pending
            words[-1] = _roundest(lower, min(lower + span, 1 << 64)) >> 32
        return words.astype(">u4").tobytes().rstrip(b"\0")


def _roundest(start: int, stop: int) -> int:
    """The number from `start` to `stop` - 1 with the most zero bytes at its end."""
    for zero_bits in range(56, -1, -8):
        rounded = -(-start >> zero_bits) << zero_bits
        if rounded < stop:
            return rounded
    return start


class Decoder:
    """Bytes to symbols. Raises PackDamaged where no encoder can have written them."""

    def __init__(self, data: bytes) -> None:
        self._data, self._bits = data, 0.0
        whole_words = data + bytes(-len(data) % _WORD_BYTES)
        self._coder = _constriction().queue.RangeDecoder(
            np.frombuffer(whole_words, ">u4").astype(np.uint32)
        )

    def uniform(self, sizes_R: Integers, symbols_R: Integers | None) -> Integers:
        """See Coder."""
        some_R = sizes_R > 1
        decoded_R = np.zeros(len(sizes_R), np.int64)
        if some_R.any():
            decoded_R[some_R] = self._decode(_uniform(), sizes_R[some_R].astype(np.int32))
            self._bits += float(np.log2(sizes_R[some_R]).sum())
        return decoded_R

    def categorical(
        self, weights_TA: Integers, table_R: Integers, symbols_R: Integers | None
    ) -> Integers:
        """See Coder."""
        tables_TA = _tables(weights_TA)
        chunks = [
            self._decode(_categorical(), tables_TA[table_R[rows]])
            for rows in _chunks(table_R, tables_TA.shape[1])
        ]
        decoded_R = np.concatenate(chunks).astype(np.int64) if chunks else np.zeros(0, np.int64)
        self._bits += float((PRECISION_BITS - np.log2(1 + tables_TA[table_R, decoded_R])).sum())
        return decoded_R

    def check_end(self) -> None:
        """Raise PackDamaged where there are more bytes than the symbols take: zeros at the end, or
        more than a few beyond their information.
        """
        if self._data.endswith(b"\0") or len(self._data) > self._bits / 8 + _CODER_BYTES:
            raise PackDamaged("coded symbols: bytes are left after the last")

    def _decode(self, model: Any, parameters: NDArray[Any]) -> NDArray[np.int32]:
        try:
            return self._coder.decode(model, parameters)
        except AssertionError as error:  # the only error that constriction's decoder knows
            raise PackDamaged(f"coded symbols: {error}") from None


def _constriction() -> Any:
    """constriction's streams; imported lazily, so that training runs on machines without it."""
    import constriction

    return constriction.stream


@functools.cache
def _uniform() -> Any:
    return _constriction().model.Uniform()


@functools.cache
def _categorical() -> Any:
    return _constriction().model.Categorical(perfect=False)


def share(weights_TA: Integers, total: int) -> Integers:
    """Split `total` in proportion to each row of weights: whole numbers whose sum is `total`
    exactly. Every row needs a positive weight.
    """
    cumulated_TA = weights_TA.cumsum(axis=1)
    assert int(cumulated_TA[:, -1].max()) >> MAX_WEIGHT_BITS == 0
    shares_TA = cumulated_TA * total
    if weights_TA.shape[1] >= _WIDE_TABLE:  # by a single number numpy divides several times as fast
        for shares_A, sum_of_row in zip(shares_TA, cumulated_TA[:, -1].tolist(), strict=True):
            shares_A //= sum_of_row
    else:
        shares_TA //= cumulated_TA[:, -1:]
    shares_TA[:, 1:] -= shares_TA[:, :-1].copy()
    return shares_TA


def _tables(weights_TA: Integers) -> NDArray[np.float32]:
    if weights_TA.shape[1] == 1:  # the coder knows no alphabet of one symbol
        weights_TA = np.pad(weights_TA, ((0, 0), (0, 1)))
    return share(weights_TA, (1 << PRECISION_BITS) - weights_TA.shape[1]).astype(np.float32)


def _chunks(table_R: Integers, alphabet: int) -> list[slice]:
    """Slices of the rows, so that their tables together stay small."""
    step = max(1, _ROWS_AT_ONCE_CELLS // alphabet)
    return [slice(start, start + step) for start in range(0, len(table_R), step)]
