"""The pack: the model of one task as a file of a few kilobytes. Imports neither torch nor timm.

Imports: errors.
"""

from pipeline.packs.bits import pack_codes, packed_size_bytes, unpack_codes
from pipeline.packs.calibration import Calibration
from pipeline.packs.codebook import Codebook, dequantise, levels, thresholds
from pipeline.packs.container import content_digest
from pipeline.packs.file import LEDGER_KEYS, Pack, ledger, pack_to_bytes, read_pack, write_pack
from pipeline.packs.metadata import (
    FORMAT_VERSION,
    PackBackbone,
    PackInput,
    PackMetadata,
    PackPoints,
    read_input,
)
from pipeline.packs.parts import (
    PART_BITS,
    PART_NAMES,
    Part,
    PartBits,
    PartName,
    TensorSpec,
    zero_part,
)
from pipeline.packs.positions import (
    LayerShape,
    decode_positions,
    encode_positions,
    largest_size_bytes,
)

__all__ = [
    "FORMAT_VERSION",
    "LEDGER_KEYS",
    "PART_BITS",
    "PART_NAMES",
    "Calibration",
    "Codebook",
    "LayerShape",
    "Pack",
    "PackBackbone",
    "PackInput",
    "PackMetadata",
    "PackPoints",
    "Part",
    "PartBits",
    "PartName",
    "TensorSpec",
    "content_digest",
    "decode_positions",
    "dequantise",
    "encode_positions",
    "largest_size_bytes",
    "ledger",
    "levels",
    "pack_codes",
    "pack_to_bytes",
    "packed_size_bytes",
    "read_input",
    "read_pack",
    "thresholds",
    "unpack_codes",
    "write_pack",
    "zero_part",
]
