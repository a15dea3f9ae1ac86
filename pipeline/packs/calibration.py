"""What makes probabilities and sets of classes out of a classification pack's logits: 12 bytes.

4 bytes    uint32: validation samples it was made of
4 bytes    float32: temperature, by which logits are divided (Guo et al. 2017, arXiv 1706.04599)
4 bytes    float32: threshold; a set holds the classes that are at least as probable
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from pipeline.errors import PackDamaged

_FORM = struct.Struct("<Iff")
SIZE_BYTES = _FORM.size


@dataclass(frozen=True)
class Calibration:
    """Sets hold the right class with probability `coverage`. Temperature and threshold are rounded
    to float32, as the file keeps them.

    Raises PackDamaged for numbers that are none of these.
    """

    coverage: float
    samples: int = 0
    temperature: float = 1.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "threshold"):
            object.__setattr__(self, name, float(np.float32(getattr(self, name))))
        if not (0 < self.temperature < math.inf and 0 <= self.threshold <= 1):
            raise PackDamaged(
                f"calibration: given temperature {self.temperature} and threshold"
                f" {self.threshold}; expected a positive number, and one in [0, 1]"
            )

    def to_bytes(self) -> bytes:
        """The numbers; the description holds the coverage."""
        return _FORM.pack(self.samples, self.temperature, self.threshold)

    @classmethod
    def from_bytes(cls, coverage: float, data: bytes) -> Calibration:
        """Read `to_bytes`. Raises PackDamaged."""
        return cls(coverage, *_FORM.unpack(data))
