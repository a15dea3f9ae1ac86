"""A per-user record of which checkpoint on this machine has which fingerprint.

A pack names its backbone by fingerprint, never by a path. Every run records the checkpoints it
used, so that a pack can later be loaded by name alone. Each fingerprint has its own file: runs
beside each other never overwrite what another has recorded.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.utils.files import read_json, user_cache, write_json


def remember(fingerprint: str, weights: str) -> None:
    """Record that `weights` (a path, `pretrained` or `random`) has this fingerprint."""
    weights = weights if weights in ("pretrained", "random") else str(Path(weights).resolve())
    if read_json(_note(fingerprint)) != weights:
        with contextlib.suppress(
            StorageError
        ):  # a note for later: without it, --backbone names the checkpoint
            write_json(_note(fingerprint), weights)


def recall(fingerprint: str) -> str | None:
    """The weights recorded for a fingerprint, if they still exist."""
    weights = read_json(_note(fingerprint))
    if not isinstance(weights, str):
        return None
    return weights if weights in ("pretrained", "random") or Path(weights).is_file() else None


def _note(fingerprint: str) -> Path:
    return user_cache() / "backbones" / f"{fingerprint}.json"
