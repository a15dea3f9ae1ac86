"""The identity of a backbone: one SHA-256 over its tensors, so that a pack is never applied to weights it was not trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 hex over every tensor's name, dtype, shape and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
