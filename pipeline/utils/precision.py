"""The types in which products can be computed."""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "bf16"]
"""float32, or bfloat16 on devices with units for it."""
