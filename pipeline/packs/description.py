"""What a pack says of itself and of its parts, as one short compressed text.

Canonical JSON, deflated with a dictionary of the words that most packs share: some 1.5 KB become some 400 bytes. Every shape and length that a reader
needs stands in it, so the parts can be read without building a model. The dictionary belongs to the format version: it must not change without it.
"""

from __future__ import annotations

import json
import zlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import PackDamaged, PackError
from pipeline.packs.codebook import Codebook
from pipeline.packs.metadata import FORMAT_VERSION, PackMetadata
from pipeline.packs.parts import PartBits, PartName, ScaleBits

MAX_TEXT_BYTES = 1_000_000

_Size = Annotated[int, Field(ge=1, lt=2**31)]
_Length = Annotated[int, Field(ge=0, lt=2**31)]


class PartLayout(BaseModel):
    """A part without its numbers. `positions` are the bytes that its positions take, "recomputed" where a reader computes them."""

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
    """Everything but numbers; `probe` is the number of probe images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metadata: PackMetadata
    parts: list[PartLayout]
    probe: _Length

    def to_bytes(self) -> bytes:
        """The compressed text. Raises PackError for a number that JSON cannot hold, or a text longer than a reader accepts."""
        content = {**self.model_dump(mode="json", exclude_defaults=True), "metadata": json.loads(self.metadata.to_json())}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        if len(text) > MAX_TEXT_BYTES:
            raise PackError(f"the metadata takes {len(text)} bytes; at most {MAX_TEXT_BYTES} fit; shorten the class names")
        deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zdict=_DICTIONARY)
        return deflater.compress(text) + deflater.flush()

    @classmethod
    def from_bytes(cls, data: bytes, version: int = FORMAT_VERSION) -> Description:
        """Read `to_bytes`; in version 2 all scales were of 32 bits, in 2 and 3 all had a mean. Raises PackDamaged, naming the first key at fault."""
        inflater = zlib.decompressobj(-zlib.MAX_WBITS, zdict=_DICTIONARY)
        try:
            # bounded: a few bytes can inflate to a thousand times as many
            text = inflater.decompress(data, MAX_TEXT_BYTES)
            if not inflater.eof or inflater.unused_data:
                raise PackDamaged(f"description: expected one compressed text of at most {MAX_TEXT_BYTES} bytes")
            description = cls.model_validate_json(text)
        except zlib.error as error:
            raise PackDamaged(f"description: {error}") from None
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise PackDamaged(f"description: {'.'.join(str(key) for key in fault['loc']) or 'JSON'}: {fault['msg']}") from None
        except (ValueError, RecursionError) as error:
            raise PackDamaged(f"description: {error}") from None
        if version == 2:
            parts = [part.model_copy(update={"scale_bits": 32}) for part in description.parts]
            description = description.model_copy(update={"parts": parts})
        return description


def _words() -> bytes:
    """Texts that packs are made of; what is most likely stands last, where deflate reaches it with the fewest bits."""
    blocks = "".join(f'["blocks.{block}.attn.qkv",[576]],["blocks.{block}.attn.proj",[192]],' for block in range(12))
    layers = "".join(f'["blocks.{block}.mlp.fc1",[768]],["blocks.{block}.mlp.fc2",[192]],' for block in range(12))
    norms = "".join(f'["blocks.{block}.norm2.weight",[768]],["blocks.{block}.norm2.bias",[768]],' for block in range(12))
    stages = "layers.0.blocks.0.attn.qkvstages.0.blocks.0.conv_dw.downsample.reduction.stem.0vit_base_patch16_224.augreg_in21kswin_tinyconvnext_tiny"
    arguments = '"depth":12,"embed_dim":768,"img_size":224,"num_heads":12,"patch_size":16},"fingerprint":"'
    head = '{"bits":8,"name":"head","tensors":[["head.weight",[10,768]]]},{"bits":16,"name":"head","tensors":[["head.bias",[10]]]}],"probe":2}'
    bank = '"name":"adapters","tensors":[["smoa.768.down",[4,8,768]],["smoa.768.up",[4,768,8]],["smoa.768.router",[8,768]],'
    return (
        f'{stages}{bank}["smoa.768.embeddings",[4,8]]]{norms}{blocks}{layers}["patch_embed.proj",[768]],"layers":[[2304,768],[768,768],[3072,768],[768,3072],'
        '"positions":"recomputed"},{"bits":4,"name":"connections","positions":{"bits":8,"name":"biases","tensors":[{"bits":8,"name":"norms","tensors":['
        f'{{"metadata":{{"backbone":{{"arguments":{{{arguments}","model":"vit_","trail":"'
        '"},"classes":["0","1","2","3","4","5","6","7","8","9"],"input":{"interpolation":"bicubic","mean":[0.485,0.456,0.406],"size_px":224,'
        '"std":[0.229,0.224,0.225]},"mean":[0.5,0.5,0.5],"metric":"accuracy","recipe":{"biases":{"bits":8},"connections":{"bits":8,"top_k":1},'
        '"head":{"bits":8},"norms":{"bits":8},"smoa":{"balance_weight":0.01,"bits":4,"experts":4,"router_width":8,"scale":1.0,"temperature":0.1,'
        '"width":8},"training":{"augment":false,"batch_size":32,"epochs":12,"label_smoothing":0.0,"learning_rate":0.008,"precision":"bf16",'
        f'"warmup_epochs":1.0,"weight_decay":0.0}}}},"seed":0,"selection":{{"batch_size":32,"criterion":"gradient",'
        f'"level":"neuron","loss":"contrastive","precision":"fp32","temperature":0.07}},"task":"{head}'
    ).encode()


_DICTIONARY = _words()
