"""The pack: one task's model as one small file, and what it costs byte by byte.

The content of the container (container.py):

    4 bytes   D, little-endian: length of the description
    D bytes   the description (description.py): metadata, and every part's tensors, shapes, bits
              and lengths
    for each part, in the description's order
              positions (positions.py), for connections
              codes: bits a code, end to end, the last byte filled with zeros (bits.py); or the
                  values in float16 or float32, little-endian
              scales: float16 or float32 (mean, std) of each matrix, or its std alone, for codes of
                  up to 8 bits
    the rest  float16 [P, C]: logits of the probe images, by which a reloaded model is verified

Legend: P probe images, C classes.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PackDamaged, PackError, StorageError
from pipeline.packs.bits import packed_size_bytes, unpack_codes
from pipeline.packs.calibration import SIZE_BYTES, Calibration
from pipeline.packs.codebook import MAX_CODE_BITS
from pipeline.packs.container import container_from_bytes, container_to_bytes
from pipeline.packs.description import Description, PartLayout
from pipeline.packs.metadata import PackMetadata
from pipeline.packs.parts import SCALES, Part, TensorSpec
from pipeline.packs.positions import LayerShape, decode_positions

_LENGTH_BYTES = 4
LEDGER_KEYS = (
    "positions",
    "values",
    "adapters",
    "biases",
    "norms",
    "prompts",
    "full",
    "head",
    "probe",
    "metadata",
)


@dataclass(frozen=True, eq=False)
class Pack:
    """One task's model. `probe_logits` [P, C] are rounded to float16, as the file keeps them.
    Raises PackDamaged for contradictions.
    """

    metadata: PackMetadata
    parts: tuple[Part, ...]
    probe_logits: NDArray[np.float32]
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        names = Counter((part.name, tensor.name) for part in self.parts for tensor in part.tensors)
        repeated = [f"{part}: {tensor}" for (part, tensor), count in names.items() if count > 1]
        if repeated:
            raise PackDamaged(f"stored twice: {', '.join(repeated)}")
        expected = (len(self.probe_logits), len(self.metadata.classes))
        if self.probe_logits.shape != expected:
            raise PackDamaged(
                f"probe logits: expected [P, {expected[1]}] for {expected[1]} classes, given"
                f" {list(self.probe_logits.shape)}"
            )
        with np.errstate(over="ignore"):
            rounded = self.probe_logits.astype(np.float16)
        if not np.isfinite(rounded).all():
            raise PackDamaged("probe logits: expected finite values within float16's range (65504)")
        object.__setattr__(self, "probe_logits", rounded.astype(np.float32))
        object.__setattr__(self, "parts", tuple(self.parts))


# --- writing --------------------------------------------------------------------------------------


def pack_to_bytes(pack: Pack) -> bytes:
    """The file's bytes: the same for the same pack, on every machine with the same zlib."""
    sections, description = _sections(pack)
    return container_to_bytes(_joined(description, sections))


def write_pack(path: Path | str, pack: Pack) -> int:
    """Write the file whole or not at all, replacing what is there; its size in bytes. Raises
    StorageError.
    """
    path, data = Path(path), pack_to_bytes(pack)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write a pack of {len(data)} bytes ({error.strerror}); free space or"
            " choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return len(data)


def ledger(pack: Pack) -> dict[str, int]:
    """Bytes by LEDGER_KEYS; their sum is the file's size. `values` are the connections', `metadata`
    is all that no part accounts for.
    """
    sections, description = _sections(pack)
    spent = Counter(dict.fromkeys(LEDGER_KEYS, 0))
    for key, data in sections:
        spent[key] += len(data)
    spent["metadata"] += len(container_to_bytes(_joined(description, sections))) - spent.total()
    return dict(spent)


def _sections(pack: Pack) -> tuple[list[tuple[str, bytes]], Description]:
    """The bytes of the content in order, each with its key in the ledger, and the description that
    tells how to read them.
    """
    sections, layouts = [], []
    for part in pack.parts:
        key = "values" if part.name == "connections" else part.name
        sections += [("positions", part.encoded_positions)]
        sections += [(key, data) for data in part.encoded_values]
        layouts.append(_layout(part))
    sections.append(("probe", pack.probe_logits.astype("<f2").tobytes()))
    if pack.calibration is not None:
        sections.append(("metadata", pack.calibration.to_bytes()))
    return sections, Description(
        metadata=pack.metadata,
        parts=layouts,
        probe=len(pack.probe_logits),
        coverage=None if pack.calibration is None else pack.calibration.coverage,
    )


def _layout(part: Part) -> PartLayout:
    return PartLayout(
        name=part.name,
        bits=part.bits,
        tensors=[(tensor.name, list(tensor.shape)) for tensor in part.tensors],
        layers=list(part.layers),
        positions="recomputed" if part.recomputed else len(part.encoded_positions),
        codebook=part.codebook,
        by_row=part.by_row,
        scale_bits=part.scale_bits,
        has_mean=part.has_mean,
    )


def _joined(description: Description, sections: Sequence[tuple[str, bytes]]) -> bytes:
    text = description.to_bytes()
    return b"".join(
        [len(text).to_bytes(_LENGTH_BYTES, "little"), text, *(data for _, data in sections)]
    )


# --- reading --------------------------------------------------------------------------------------


def read_pack(source: Path | str | bytes) -> Pack:
    """Read a file, or its bytes, and check everything before use; nothing in it is executed.

    Raises PackForeign, PackTruncated, PackVersionError or PackDamaged for what is wrong with the
    content, PackError where there is no such file.
    """
    if isinstance(source, bytes):
        return _parse(source)
    try:
        return _parse(Path(source).read_bytes())
    except FileNotFoundError:
        raise PackError(f"{source}: no such file") from None
    except OSError as error:
        raise PackError(f"{source}: cannot be read ({error.strerror})") from None
    except PackError as error:
        raise type(error)(f"{source}: {error}") from None


def _parse(data: bytes) -> Pack:
    version, body = container_from_bytes(data)
    content = _Content(body)
    description = Description.from_bytes(
        content.take(int.from_bytes(content.take(_LENGTH_BYTES), "little")), version
    )
    parts = tuple(_read_part(layout, content) for layout in description.parts)
    shape = (description.probe, len(description.metadata.classes))
    probe_logits = content.array("<f2", math.prod(shape)).reshape(shape).astype(np.float32)
    calibration = None
    if description.coverage is not None:
        calibration = Calibration.from_bytes(description.coverage, content.take(SIZE_BYTES))
    if content.left_bytes:
        raise PackDamaged(f"{content.left_bytes} bytes that no part owns")
    return Pack(description.metadata, parts, probe_logits, calibration)


class _Content:
    """Reads bytes from the front, and allocates nothing before its bytes are known to exist."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left_bytes(self) -> int:
        return len(self._data) - self._at

    def take(self, size_bytes: int) -> bytes:
        if size_bytes > self.left_bytes:
            raise PackDamaged(
                f"the description claims {size_bytes} bytes where {self.left_bytes} are left"
            )
        self._at += size_bytes
        return self._data[self._at - size_bytes : self._at]

    def array(self, dtype: str, count: int) -> NDArray[Any]:
        values = np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)
        return values.astype(values.dtype.newbyteorder("="))


def _read_part(layout: PartLayout, content: _Content) -> Part:
    specs = tuple(TensorSpec(name, tuple(shape)) for name, shape in layout.tensors)
    count, groups = (
        sum(spec.count for spec in specs),
        sum(spec.groups(layout.by_row) for spec in specs),
    )
    recomputed = layout.positions == "recomputed"
    positions_data = b"" if layout.positions == "recomputed" else content.take(layout.positions)
    scales = None
    if layout.bits <= MAX_CODE_BITS:
        codes: NDArray[Any] = unpack_codes(
            content.take(packed_size_bytes(count, layout.bits)), count, layout.bits
        ).astype(np.uint8)
        scales = np.zeros((groups, 2), np.float32)
        stored = scales[:, 0 if layout.has_mean else 1 :]
        stored[:] = content.array(SCALES[layout.scale_bits], stored.size).reshape(stored.shape)
    else:
        codes = content.array("<f2" if layout.bits == 16 else "<f4", count)
    positions: tuple[NDArray[np.int64], ...] = ()
    if (
        layout.layers and not recomputed
    ):  # after the values: a layer cannot claim more connections than it has values
        if len(layout.layers) != len(specs):
            raise PackDamaged(
                f"part {layout.name!r}: {len(specs)} tensors in {len(layout.layers)} layers"
            )
        shapes = [
            LayerShape(rows, columns, spec.count)
            for spec, (rows, columns) in zip(specs, layout.layers, strict=True)
        ]
        positions = tuple(decode_positions(positions_data, shapes))
    elif positions_data:
        raise PackDamaged(f"part {layout.name!r} has positions but no layers")
    return Part(
        layout.name,
        layout.bits,
        specs,
        codes,
        scales,
        positions,
        tuple(layout.layers),
        recomputed,
        layout.codebook,
        layout.by_row,
        layout.scale_bits,
        layout.has_mean,
    )
