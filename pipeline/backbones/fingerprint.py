"""The identity of a backbone: one SHA-256 over its tensors, so that a pack is never applied to
weights it was not trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 hex over every tensor's name, dtype, shape and bytes, in order of name."""
    return fingerprint_and_trail(state)[0]


def fingerprint_and_trail(state: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """The fingerprint, and the first byte (two hex digits) of the hash as it stood after each
    tensor.

    Two backbones' trails agree up to the first tensor that differs, and after it only by chance.
    """
    digest, trail = hashlib.sha256(), ""
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        trail += digest.copy().hexdigest()[:2]
    return digest.hexdigest(), trail
