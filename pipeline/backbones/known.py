"""A per-user record of which checkpoint on this machine has which fingerprint.

A pack names its backbone by fingerprint, never by a path. Every run records the checkpoints it
used, so that a pack can later be loaded by name alone.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.utils.files import read_json, user_cache, write_json


def remember(fingerprint: str, weights: str) -> None:
    """Record that `weights` (a path, `pretrained` or `random`) has this fingerprint."""
    weights = weights if weights in ("pretrained", "random") else str(Path(weights).resolve())
    known = read_json(_note()) or {}
    if known.get(fingerprint) != weights:
        with contextlib.suppress(
            StorageError
        ):  # a note for later: without it, --backbone names the checkpoint
            write_json(_note(), {**known, fingerprint: weights})


def recall(fingerprint: str) -> str | None:
    """The weights recorded for a fingerprint, if they still exist."""
    weights = (read_json(_note()) or {}).get(fingerprint)
    return (
        weights
        if weights in ("pretrained", "random") or (weights and Path(weights).is_file())
        else None
    )


def _note() -> Path:
    return user_cache() / "backbones.json"
