"""The validation outputs of a trial, kept for questions that come later: paired tests between
trials, other metrics, thresholds, ensembles.

    outputs  float16 [N, ...], numbers beyond its range clipped; whole numbers as they are
    targets  whole numbers in the smallest type that holds them, [N, ...]

N samples are in the order of the validation split. The file's metadata holds a SHA-256 over both.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.errors import StorageError
from pipeline.kinds import Outcomes

_HALF_MAX = float(np.finfo(np.float16).max)


def write_outcomes(path: Path, outcomes: Outcomes) -> None:
    """Write the file whole or not at all. Raises StorageError."""
    arrays = {"outputs": _halved(outcomes.outputs), "targets": _halved(outcomes.targets)}
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, scratch, {"digest": _digest(arrays)})
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path}: cannot be written ({error}); free space, or choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def read_outcomes(path: Path) -> Outcomes | None:
    """What `write_outcomes` wrote; None for a file that is missing or damaged."""
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in ("outputs", "targets")}
            if (file.metadata() or {}).get("digest") != _digest(arrays):
                return None
    except (OSError, SafetensorError):
        return None
    outputs, targets = arrays["outputs"], arrays["targets"]
    is_half = outputs.dtype == np.float16
    return Outcomes(outputs.astype(np.float32) if is_half else outputs, targets)


def _halved(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        return np.clip(array, -_HALF_MAX, _HALF_MAX).astype(np.float16)
    smallest = np.min_scalar_type(int(array.max(initial=0)))
    return np.ascontiguousarray(array.astype(smallest)) if array.min(initial=0) >= 0 else array


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
