"""A part: the trained tensors of one kind that share a bit width, as the codes that the file
stores.

Up to 8 bits a tensor is codes of a fixed codebook with one (mean, std) for each trailing 2-D
matrix: a bank of experts [E, h, D] has E pairs, a matrix or a vector one; `by_row`, every row of a
matrix has its own. Scales are floats of 16 bits, or of 32 where another program wrote them. A part
without `has_mean` keeps each std alone: its means are 0. At 16 and 32 bits the codes are the values
themselves.

Connections also carry their positions: tensor n, of shape [N], holds the values at the ascending
flat indices `positions[n]` [N] of a weight of `layers[n]` = (O, I), seen as one row-major [O, I]
matrix.
Positions that a reader recomputes from the backbone, such as the largest weights, are not stored:
`recomputed`.

A conceptual part may mix widths (a head's weight at 1 bit, its bias at 16): it is then several
Parts of one name.

Legend: G groups (pairs of scales), O output neurons, I inputs of a neuron, N connections of a
layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PackDamaged
from pipeline.packs.bits import pack_codes
from pipeline.packs.codebook import MAX_CODE_BITS, Codebook, dequantise
from pipeline.packs.positions import LayerShape, check_indices, encode_positions

PartName = Literal["connections", "biases", "norms", "adapters", "prompts", "full", "head"]
PartBits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
ScaleBits = Literal[16, 32]
SCALES: dict[ScaleBits, str] = {16: "<f2", 32: "<f4"}
"""The type of a scale in the file."""
PART_NAMES: tuple[PartName, ...] = get_args(PartName)
PART_BITS: tuple[PartBits, ...] = get_args(PartBits)


@dataclass(frozen=True)
class TensorSpec:
    """Name and shape of one tensor, in the module naming of the adapted model."""

    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def groups(self, by_row: bool) -> int:
        """Number of (mean, std) pairs: one for each trailing 2-D matrix, or for each row of it; a
        vector has one.
        """
        return math.prod(self.shape[:-1] if by_row else self.shape[:-2])


@dataclass(frozen=True, eq=False)
class Part:
    """Codes of the tensors, flat and in order; checked when built. Raises PackDamaged for anything
    that contradicts itself.

    codes: uint8 below 2^bits for bits <= 8, float16 for 16, float32 for 32. scales: float32 [G, 2]
    of (mean, std) for bits <= 8, otherwise None; numbers that `scale_bits` hold. layers: (O, I) of
    each tensor's layer, and positions: int64 [N] each unless `recomputed`; for connections only.
    """

    name: PartName
    bits: PartBits
    tensors: tuple[TensorSpec, ...]
    codes: NDArray[Any]
    scales: NDArray[np.float32] | None = None
    positions: tuple[NDArray[np.int64], ...] = ()
    layers: tuple[tuple[int, int], ...] = ()
    recomputed: bool = False
    codebook: Codebook = "median"
    by_row: bool = False
    scale_bits: ScaleBits = 16
    has_mean: bool = True

    def __post_init__(self) -> None:
        self._require(self.name in PART_NAMES, f"expected one of {', '.join(PART_NAMES)}")
        self._require(
            self.bits in PART_BITS, f"given {self.bits} bits; expected one of {PART_BITS}"
        )
        self._check_tensors()
        self._check_codes()
        self._check_scales()
        self._check_positions()

    @property
    def count(self) -> int:
        """Number of values of all tensors."""
        return sum(tensor.count for tensor in self.tensors)

    @property
    def groups(self) -> int:
        """Number of (mean, std) pairs of all tensors: G."""
        return sum(tensor.groups(self.by_row) for tensor in self.tensors)

    @property
    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """Shape of each layer of connections; empty for other parts."""
        return tuple(
            LayerShape(rows, columns, tensor.count)
            for tensor, (rows, columns) in zip(self.tensors, self.layers, strict=False)
        )

    @functools.cached_property
    def encoded_positions(self) -> bytes:
        """The positions as the file has them; empty where there are none, or where a reader
        computes them.
        """
        return encode_positions(self.positions, self.layer_shapes) if self.positions else b""

    @functools.cached_property
    def encoded_values(self) -> tuple[bytes, bytes]:
        """The codes and the scales as the file has them."""
        if self.scales is None:
            return self.codes.astype(self.codes.dtype.newbyteorder("<")).tobytes(), b""
        scales = self.scales[:, 0 if self.has_mean else 1 :].astype(SCALES[self.scale_bits])
        return pack_codes(self.codes, self.bits), scales.tobytes()

    def values(self) -> dict[str, NDArray[np.float32]]:
        """The tensors by name in float32, dequantised; new arrays on every call."""
        return {tensor.name: values for tensor, values in self._dequantised()}

    def _dequantised(self) -> Iterator[tuple[TensorSpec, NDArray[np.float32]]]:
        value, group = 0, 0
        for tensor in self.tensors:
            codes = self.codes[value : value + tensor.count]
            groups = tensor.groups(self.by_row)
            scales = None if self.scales is None else self.scales[group : group + groups]
            values = (
                codes.astype(np.float32)
                if scales is None
                else dequantise(codes, scales, self.bits, self.codebook)
            )
            yield tensor, values.reshape(tensor.shape)
            value, group = value + tensor.count, group + groups

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise PackDamaged(f"part {self.name!r}: {message}")

    def _check_tensors(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        self._require(len(names) > 0, "holds no tensor; leave the part out")
        self._require(len(set(names)) == len(names), "two of its tensors have the same name")
        for tensor in self.tensors:
            self._require(
                all(size >= 1 for size in tensor.shape),
                f"tensor {tensor.name!r} of shape {list(tensor.shape)} holds no value",
            )

    def _check_codes(self) -> None:
        kind = np.dtype(code_dtype(self.bits))
        self._require(
            self.codes.dtype == kind,
            f"codes of {self.bits} bits are {kind}; given {self.codes.dtype}",
        )
        self._require(
            self.codes.shape == (self.count,),
            f"its tensors hold {self.count} values; given codes of shape {list(self.codes.shape)}",
        )
        if self.bits <= MAX_CODE_BITS:
            self._require(
                int(self.codes.max()) < 2**self.bits,
                f"code {int(self.codes.max())} does not fit in {self.bits} bits",
            )
        else:
            self._require(
                bool(np.isfinite(self.codes).all()), f"a value is not finite at {self.bits} bits"
            )

    def _check_scales(self) -> None:
        if self.bits > MAX_CODE_BITS:
            self._require(self.scales is None, f"values of {self.bits} bits have no scales")
            return
        expected = (self.groups, 2)
        given = None if self.scales is None else (self.scales.dtype, self.scales.shape)
        self._require(
            given == (np.dtype(np.float32), expected),
            f"expected float32 scales of shape {list(expected)}; given {given}",
        )
        assert self.scales is not None
        self._require(
            bool(np.isfinite(self.scales).all() and (self.scales[:, 1] >= 0).all()),
            "scales must be finite, and each std at least 0",
        )
        self._require(
            self.has_mean or not self.scales[:, 0].any(),
            "a mean that is not 0 in a part without means",
        )
        if self.scale_bits == 16:
            with np.errstate(over="ignore"):
                self._require(
                    np.array_equal(self.scales.astype(np.float16), self.scales),
                    "scales of 16 bits must be float16 numbers",
                )

    def _check_positions(self) -> None:
        expected = len(self.tensors) if self.name == "connections" else 0
        self._require(
            len(self.layers) == expected,
            f"expected the shapes of {expected} layers; given {len(self.layers)}",
        )
        stored = 0 if self.recomputed else expected
        self._require(
            len(self.positions) == stored,
            f"expected positions of {stored} layers; given {len(self.positions)}",
        )
        for tensor, shape in zip(self.tensors, self.layer_shapes, strict=bool(expected)):
            fits = len(tensor.shape) == 1 and 1 <= tensor.count <= shape.rows * shape.columns
            self._require(
                fits,
                f"tensor {tensor.name!r} of shape {list(tensor.shape)} is no list of entries of a"
                f" weight [{shape.rows}, {shape.columns}]",
            )
        for number, (index_N, shape) in enumerate(
            zip(self.positions, self.layer_shapes, strict=False)
        ):
            check_indices(index_N, shape, number)


def zero_part(
    name: PartName,
    bits: PartBits,
    tensors: tuple[TensorSpec, ...],
    positions: tuple[NDArray[np.int64], ...] = (),
    layers: tuple[tuple[int, int], ...] = (),
    recomputed: bool = False,
    codebook: Codebook = "median",
    by_row: bool = False,
    has_mean: bool = True,
) -> Part:
    """A part of these shapes and positions with codes and scales 0; it takes as many bytes as the
    trained one.
    """
    count, groups = (
        sum(tensor.count for tensor in tensors),
        sum(tensor.groups(by_row) for tensor in tensors),
    )
    scales = np.zeros((groups, 2), np.float32) if bits <= MAX_CODE_BITS else None
    return Part(
        name,
        bits,
        tensors,
        np.zeros(count, code_dtype(bits)),
        scales,
        positions,
        layers,
        recomputed,
        codebook,
        by_row,
        has_mean=has_mean,
    )


def code_dtype(bits: int) -> type[np.generic]:
    """What a part's codes are in memory: uint8 up to 8 bits, then float16 and float32."""
    return np.float32 if bits == 32 else np.float16 if bits == 16 else np.uint8
