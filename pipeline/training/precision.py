"""Which numbers a device trains with."""

from __future__ import annotations

import torch

from pipeline.spec import Training

_CPU_UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""What torch calls the units for bfloat16 of x86 and ARM processors."""


def has_bf16_units(device: str) -> bool:
    """Whether `device` computes in bfloat16 rather than emulates it: a processor that emulates takes ten times as long as in float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(unit) for unit in _CPU_UNITS)


def training_dtype(spec: Training, device: str) -> torch.dtype:
    """What a trial computes with. bf16 is for speed, so float32 stands in for it where it would be slower."""
    return torch.bfloat16 if spec.precision == "bf16" and has_bf16_units(device) else torch.float32
