"""The description of a pack and its parts, as one short compressed text.

Canonical JSON, deflated with a dictionary of the words that most packs share: some 1.5 KB become
some 400 bytes. It has every shape and length that a reader needs, so the parts can be read without
building a model. The dictionary (dictionary.py) belongs to the format version.
"""

from __future__ import annotations

import json
import zlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import PackDamaged, PackError
from pipeline.packs.codebook import Codebook
from pipeline.packs.dictionary import dictionary
from pipeline.packs.metadata import FORMAT_VERSION, PackMetadata
from pipeline.packs.parts import PartBits, PartName, ScaleBits

MAX_TEXT_BYTES = 1_000_000

_Size = Annotated[int, Field(ge=1, lt=2**31)]
_Length = Annotated[int, Field(ge=0, lt=2**31)]


class PartLayout(BaseModel):
    """A part without its numbers. `positions` are the bytes that its positions take, "recomputed"
    where a reader computes them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: PartName
    bits: PartBits
    tensors: list[tuple[str, Annotated[list[_Size], Field(max_length=8)]]]
    layers: list[tuple[_Size, _Size]] = []
    positions: _Length | Literal["recomputed"] = 0
    codebook: Codebook = "median"
    by_row: bool = False
    scale_bits: ScaleBits = 16
    has_mean: bool = True


class Description(BaseModel):
    """Everything but numbers; `probe` is the number of probe images, `coverage` that of the
    calibration, if there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metadata: PackMetadata
    parts: list[PartLayout]
    probe: _Length
    coverage: Annotated[float, Field(ge=0.5, lt=1, allow_inf_nan=False)] | None = None

    def to_bytes(self) -> bytes:
        """The compressed text. Raises PackError for a number that JSON cannot hold, or a text
        longer than a reader accepts.
        """
        content = {
            **self.model_dump(mode="json", exclude_defaults=True),
            "metadata": json.loads(self.metadata.to_json()),
        }
        text = json.dumps(
            content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()
        if len(text) > MAX_TEXT_BYTES:
            raise PackError(
                f"the metadata takes {len(text)} bytes; at most {MAX_TEXT_BYTES} fit; shorten the"
                " class names"
            )
        deflater = zlib.compressobj(
            9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zdict=dictionary(FORMAT_VERSION)
        )
        return deflater.compress(text) + deflater.flush()

    @classmethod
    def from_bytes(cls, data: bytes, version: int = FORMAT_VERSION) -> Description:
        """Read `to_bytes`; in version 2 all scales were of 32 bits, in 2 and 3 all had a mean.
        Raises PackDamaged, naming the first key at fault.
        """
        inflater = zlib.decompressobj(-zlib.MAX_WBITS, zdict=dictionary(version))
        try:
            # bounded: a few bytes can inflate to a thousand times as many
            text = inflater.decompress(data, MAX_TEXT_BYTES)
            if not inflater.eof or inflater.unused_data:
                raise PackDamaged(
                    f"description: expected one compressed text of at most {MAX_TEXT_BYTES} bytes"
                )
            description = cls.model_validate_json(text)
        except zlib.error as error:
            raise PackDamaged(f"description: {error}") from None
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise PackDamaged(
                f"description: {'.'.join(str(key) for key in fault['loc']) or 'JSON'}:"
                f" {fault['msg']}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise PackDamaged(f"description: {error}") from None
        if version == 2:
            parts = [part.model_copy(update={"scale_bits": 32}) for part in description.parts]
            description = description.model_copy(update={"parts": parts})
        return description
