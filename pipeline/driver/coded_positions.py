"""The positions of a task's connections as its packs store them: coded once, by a worker of the
cluster, and kept beside the selection.

Coding them takes seconds for a large backbone, and the driver follows many studies at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.adaptation.packing import positions_digest
from pipeline.packs import Part
from pipeline.packs.positions import encode_positions

QUICKLY_CODED = 3000
"""Positions that are coded in a tenth of a second."""

Compute = Callable[..., Any]
"""Called with a function and its arguments; gives what the function gives."""


@dataclass(frozen=True)
class CodedPositions:
    """Codes positions of parts.

    Args:
        selection: the file of the task's selection.
        elsewhere: computes what takes long.
    """

    selection: Path
    elsewhere: Compute

    def __call__(self, part: Part) -> bytes:
        """The positions of a part as a pack stores them."""
        if sum(map(len, part.positions)) <= QUICKLY_CODED:
            return part.encoded_positions
        path = self.selection.with_name(
            f"{self.selection.stem}-{positions_digest(part)[:16]}.positions"
        )
        if path.exists():
            return path.read_bytes()
        coded: bytes = self.elsewhere(encode_positions, part.positions, part.layer_shapes)
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):  # the next run codes them again
            scratch.write_bytes(coded)
            os.replace(scratch, path)
        return coded
