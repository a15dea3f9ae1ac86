"""The pack: one task's model as one small file, what it costs byte by byte, and what it will cost before it is trained.

The tensors of the container (container.py): for each part `codes` (bit-packed uint8, or the float values), `scales` and, for connections,
`positions`; `layout`, the parts' structure as zlib-compressed JSON; `probe`, the logits [P, C] of some probe images, by which a reloaded model is
verified. Values and positions have fixed widths, so a file's size depends only on its metadata and shapes.

Legend: P probe images, C classes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.errors import PackDamaged, PackError, StorageError
from pipeline.packs.bits import pack_codes, unpack_codes
from pipeline.packs.codebook import MAX_CODE_BITS
from pipeline.packs.container import MAX_HEADER_BYTES, Tensors, container_from_bytes, container_to_bytes
from pipeline.packs.metadata import PackMetadata
from pipeline.packs.parts import Part, PartBits, PartName, TensorSpec, code_dtype
from pipeline.packs.positions import decode_positions, encode_positions

LEDGER_KEYS = ("positions", "values", "adapters", "biases", "norms", "prompts", "full", "head", "probe", "metadata")


@dataclass(frozen=True, eq=False)
class Pack:
    """One task's model. `probe_logits` [P, C] are rounded to float16, as the file keeps them. Raises PackDamaged for contradictions."""

    metadata: PackMetadata
    parts: tuple[Part, ...]
    probe_logits: NDArray[np.float32]

    def __post_init__(self) -> None:
        names = Counter((part.name, tensor.name) for part in self.parts for tensor in part.tensors)
        repeated = [f"{part}: {tensor}" for (part, tensor), count in names.items() if count > 1]
        if repeated:
            raise PackDamaged(f"stored twice: {', '.join(repeated)}")
        expected = (len(self.probe_logits), len(self.metadata.classes))
        if self.probe_logits.shape != expected:
            raise PackDamaged(f"probe logits: expected [P, {expected[1]}] for {expected[1]} classes, given {list(self.probe_logits.shape)}")
        with np.errstate(over="ignore"):
            rounded = self.probe_logits.astype(np.float16)
        if not np.isfinite(rounded).all():
            raise PackDamaged("probe logits: expected finite values within float16's range (65504)")
        object.__setattr__(self, "probe_logits", rounded.astype(np.float32))
        object.__setattr__(self, "parts", tuple(self.parts))


# --- writing --------------------------------------------------------------------------------------------------------------------------------


def pack_to_bytes(pack: Pack) -> bytes:
    """The file's bytes: the same for the same pack, on every machine with the same zlib."""
    return container_to_bytes(pack.metadata.to_json(), _pack_tensors(pack))


def write_pack(path: Path | str, pack: Pack) -> int:
    """Write the file whole or not at all, replacing what is there; its size in bytes. Raises StorageError."""
    path, data = Path(path), pack_to_bytes(pack)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot write a pack of {len(data)} bytes ({error.strerror}); free space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return len(data)


def predict_size_bytes(metadata: PackMetadata, parts: Sequence[Part], probe_images: int) -> int:
    """The size of the file before anything is trained: give `zero_part`s of the final shapes and the final metadata. Exact to the byte."""
    probe_logits = np.zeros((probe_images, len(metadata.classes)), np.float32)
    return len(pack_to_bytes(Pack(metadata, tuple(parts), probe_logits)))


def ledger(pack: Pack) -> dict[str, int]:
    """Bytes by LEDGER_KEYS; their sum is the file's size. `values` are the connections', `metadata` is all that no part accounts for."""
    tensors = _pack_tensors(pack)
    spent = Counter(dict.fromkeys(LEDGER_KEYS, 0))
    for name, tensor in tensors.items():
        part, _, kind = name.partition(".")
        key = "metadata" if part == "layout" else part
        if part == "connections":
            key = "positions" if kind.endswith("positions") else "values"
        spent[key] += tensor.nbytes
    spent["metadata"] += len(container_to_bytes(pack.metadata.to_json(), tensors)) - spent.total()
    return dict(spent)


def _pack_tensors(pack: Pack) -> Tensors:
    tensors: Tensors = {"layout": _bytes_array(_layout(pack.parts)), "probe": pack.probe_logits.astype(np.float16)}
    for prefix, part in zip(_prefixes([part.name for part in pack.parts]), pack.parts, strict=True):
        if part.scales is None:
            tensors[f"{prefix}.codes"] = part.codes
        else:
            tensors[f"{prefix}.codes"] = _bytes_array(pack_codes(part.codes, part.bits))
            tensors[f"{prefix}.scales"] = part.scales
        if part.positions:
            tensors[f"{prefix}.positions"] = _bytes_array(encode_positions(list(zip(part.positions, part.columns, strict=True))))
    return tensors


def _prefixes(names: Sequence[str]) -> list[str]:
    """Tensor prefixes of parts of these names: head, head.2, head.3 ..."""
    seen: Counter[str] = Counter()
    prefixes = []
    for name in names:
        seen[name] += 1
        prefixes.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return prefixes


def _bytes_array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


# --- the layout -----------------------------------------------------------------------------------------------------------------------------

_Size = Annotated[int, Field(ge=1, lt=2**31)]


class _PartLayout(BaseModel):
    """A part without its numbers. A connection tensor's shape is its layer's rows and top_k."""

    model_config = ConfigDict(extra="forbid")

    name: PartName
    bits: PartBits
    tensors: list[tuple[str, Annotated[list[_Size], Field(max_length=8)]]]
    columns: list[_Size] = []


_LAYOUTS = TypeAdapter(list[_PartLayout])


def _layout(parts: Sequence[Part]) -> bytes:
    return zlib.compress(_LAYOUTS.dump_json([_part_layout(part) for part in parts], exclude_defaults=True), level=9)


def _part_layout(part: Part) -> _PartLayout:
    tensors = [(tensor.name, list(tensor.shape)) for tensor in part.tensors]
    return _PartLayout(name=part.name, bits=part.bits, tensors=tensors, columns=list(part.columns))


def _read_layout(data: bytes) -> list[_PartLayout]:
    inflater = zlib.decompressobj()
    try:
        # bounded: a few bytes can inflate to a thousand times as many
        text = inflater.decompress(data, MAX_HEADER_BYTES)
        if not inflater.eof or inflater.unused_data:
            raise PackDamaged(f"layout: expected one compressed text of at most {MAX_HEADER_BYTES} bytes")
        return _LAYOUTS.validate_json(text)
    except zlib.error as error:
        raise PackDamaged(f"layout: {error}") from None
    except ValidationError as error:
        raise PackDamaged(f"layout: {error.errors(include_url=False)[0]['msg']}") from None


# --- reading --------------------------------------------------------------------------------------------------------------------------------


def read_pack(source: Path | str | bytes) -> Pack:
    """Read a file, or its bytes, and check everything before use; nothing in it is executed.

    Raises PackForeign, PackTruncated, PackVersionError or PackDamaged for what is wrong with the content, PackError where there is no such file.
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
    text, tensors = container_from_bytes(data)
    metadata = PackMetadata.from_json(text)
    layouts = _read_layout(_take(tensors, "layout", np.uint8, 1).tobytes())
    probe_logits = _take(tensors, "probe", np.float16, 2).astype(np.float32)
    prefixes = _prefixes([layout.name for layout in layouts])
    parts = tuple(_read_part(prefix, layout, tensors) for prefix, layout in zip(prefixes, layouts, strict=True))
    if tensors:
        raise PackDamaged(f"tensors that no part owns: {', '.join(sorted(tensors))}")
    return Pack(metadata, parts, probe_logits)


def _read_part(prefix: str, layout: _PartLayout, tensors: Tensors) -> Part:
    specs = tuple(TensorSpec(name, tuple(shape)) for name, shape in layout.tensors)
    scales = None
    if layout.bits <= MAX_CODE_BITS:
        stored = _take(tensors, f"{prefix}.codes", np.uint8, 1)
        codes: NDArray[Any] = unpack_codes(stored.tobytes(), sum(spec.count for spec in specs), layout.bits).astype(np.uint8)
        scales = _take(tensors, f"{prefix}.scales", np.float32, 2).copy()
    else:
        codes = _take(tensors, f"{prefix}.codes", code_dtype(layout.bits), 1).copy()
    positions = _read_positions(prefix, layout, tensors) if layout.columns else ()
    return Part(layout.name, layout.bits, specs, codes, scales, positions, tuple(layout.columns))


def _read_positions(prefix: str, layout: _PartLayout, tensors: Tensors) -> tuple[NDArray[np.int32], ...]:
    if len(layout.columns) != len(layout.tensors) or any(len(shape) != 2 for _, shape in layout.tensors):
        raise PackDamaged(f"layout: {prefix}: expected tensors [rows, top_k] and as many column counts")
    shapes = [(shape[0], shape[1], columns) for (_, shape), columns in zip(layout.tensors, layout.columns, strict=True)]
    return tuple(decode_positions(_take(tensors, f"{prefix}.positions", np.uint8, 1).tobytes(), shapes))


def _take(tensors: Tensors, name: str, dtype: type[np.generic], dimensions: int) -> NDArray[Any]:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise PackDamaged(f"tensor {name!r} is missing")
    if tensor.dtype != dtype or tensor.ndim != dimensions:
        raise PackDamaged(f"tensor {name!r}: expected {np.dtype(dtype)} of {dimensions} dimensions, found {tensor.dtype} {list(tensor.shape)}")
    return tensor
