"""The files of Binary Adapter (arXiv 2307.16867), as its authors publish them: a pack's parts
without a header, and a YAML file.

    each low-bit matrix    codes, one bit each: 8 a byte, the first in the lowest bit, row by row of
    [out, in]; float32 mean, float32 std
    a float head, last     float32 weight [C, D], float32 bias [C]

Matrices come in the order of the modules: of each block `down`, `up` (AdaptFormer), or q's `down`,
`up` and then v's (LoRA); the head is last. A code is the number of a level of `levels(1)`, and
w_hat = level * std + mean: parts hold such a file exactly, with the same codes and float32 scales.
The text says what the bytes cannot: method, width, classes, and the scale by which the adapters'
output is multiplied. All numbers are little-endian. Files of more bits were never published and are
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ExportError, PackDamaged, PackTruncated
from pipeline.packs.bits import pack_codes, unpack_codes
from pipeline.packs.parts import Part, PartName, TensorSpec

BACKBONE: Final = "vit_base_patch16_224_in21k"
_SCALES_BYTES = 8
_CODES_A_BYTE = 8


class Description(BaseModel):
    """The YAML text: `scale` multiplies the adapters' output, `dim` is their width, `dataset` the
    task, `bihead` a one-bit head without bias.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    backbone: Literal["vit_base_patch16_224_in21k"] = BACKBONE
    bit: Literal[1] = 1
    dataset: str = Field(min_length=1)
    dim: int = Field(ge=1, le=1024)
    method: Literal["adaptformer", "adaptformer-bihead", "lora", "lora-bihead"]
    num_class: int = Field(ge=2, le=65536)
    scale: float = Field(gt=0)

    @classmethod
    def from_mapping(cls, content: Any) -> Description:
        """Check what a YAML file holds. Raises PackDamaged, naming the first key at fault."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            key = ".".join(str(key) for key in fault["loc"]) or "expected a mapping"
            raise PackDamaged(f"Binary Adapter's description: {key}: {fault['msg']}") from None


Layout = Sequence[tuple[PartName, int, Sequence[TensorSpec]]]
"""For each part its name, its bits (1 or 32) and its tensors, in the file's order."""


def read_parts(data: bytes, layout: Layout) -> tuple[Part, ...]:
    """The parts of a file. Raises PackTruncated or PackDamaged where it has another length, or
    holds numbers that are none.
    """
    expected = sum(_size_bytes(spec, bits) for _, bits, specs in layout for spec in specs)
    if len(data) != expected:
        kind = PackTruncated if len(data) < expected else PackDamaged
        raise kind(
            f"a Binary Adapter file of this description takes {expected} bytes; found {len(data)};"
            " are the two of one task?"
        )
    parts, start = [], 0
    for name, bits, specs in layout:
        stop = start + sum(_size_bytes(spec, bits) for spec in specs)
        parts.append(_read_part(name, bits, specs, data[start:stop]))
        start = stop
    return tuple(parts)


def _read_part(name: PartName, bits: int, specs: Sequence[TensorSpec], data: bytes) -> Part:
    if bits == 32:
        return Part(name, 32, tuple(specs), np.frombuffer(data, "<f4").astype(np.float32))
    codes, scales, start = [], [], 0
    for spec in specs:
        middle, stop = start + spec.count // _CODES_A_BYTE, start + _size_bytes(spec, bits)
        codes.append(unpack_codes(data[start:middle], spec.count, 1).astype(np.uint8))
        scales.append(np.frombuffer(data[middle:stop], "<f4").astype(np.float32))
        start = stop
    return Part(name, 1, tuple(specs), np.concatenate(codes), np.stack(scales), scale_bits=32)


def write_parts(parts: Sequence[Part]) -> bytes:
    """The file of parts that `read_parts` could give, to the byte. Raises ExportError for other
    widths.
    """
    chunks = []
    for part in parts:
        if part.bits == 32:
            chunks.append(part.codes.astype("<f4").tobytes())
            continue
        if (
            part.bits != 1
            or part.scales is None
            or part.by_row
            or part.codebook != "median"
            or any(spec.groups(False) != 1 for spec in part.tensors)
        ):
            raise ExportError(
                "Binary Adapter's files hold matrices of 1 bit with one mean and std, and a float"
                f" head; the part {part.name} has {part.bits} bits, codebook {part.codebook},"
                f" statistics {'by row' if part.by_row else 'by matrix'}"
            )
        if any(spec.count % _CODES_A_BYTE for spec in part.tensors):
            raise ExportError(
                "Binary Adapter's files hold whole bytes of codes; a matrix of the part"
                f" {part.name} ends within one"
            )
        stops = np.cumsum([spec.count for spec in part.tensors])[:-1]
        for codes, scales in zip(np.split(part.codes, stops), part.scales, strict=True):
            chunks += [pack_codes(codes, 1), scales.astype("<f4").tobytes()]
    return b"".join(chunks)


def _size_bytes(spec: TensorSpec, bits: int) -> int:
    if bits == 32:
        return 4 * spec.count
    if spec.count % _CODES_A_BYTE:
        raise PackDamaged(
            f"{spec.name} of shape {list(spec.shape)} fills no whole number of bytes at 1 bit;"
            " Binary Adapter's files drop the rest"
        )
    return spec.count // _CODES_A_BYTE + _SCALES_BYTES
