"""Out-of-memory as a named error whose message says what to reduce."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.errors import OutOfMemory
from pipeline.specs import Task
from pipeline.utils.devices import device_name, is_accelerator, memory_bytes

_GIB = 1 << 30


@contextlib.contextmanager
def named_out_of_memory(
    task: Task, batch_size: int, device: str, setting: str = "training.batch_size"
) -> Iterator[None]:
    """Context manager: raise OutOfMemory in place of the out-of-memory errors of torch, numpy and
    Python. `setting` names the setting that holds the batch size.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = f" of {task.input.size_px} px" if task.input.size_px is not None else ""
        raise OutOfMemory(
            f"out of memory with batches of {batch_size} images{size} in {task.backbone.model}: "
            f"{_free(device)}; lower {setting}, or use a device with more memory"
        ) from error


def even_one_by_one(device: str) -> OutOfMemory:
    """The error of a step that takes too much memory with a single image."""
    return OutOfMemory(
        f"out of memory with one image at a time: {_free(device)}; lower input.size_px, or use a"
        " device with more memory"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed. On a CPU torch has no type of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(
        error
    )


def _free(device: str) -> str:
    """A device's free memory, as text."""
    if is_accelerator(device):
        free, total = memory_bytes(device)
        return f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB are free on {device_name(device)}"
    try:
        sizes = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
        return (
            f"{int(sizes['MemAvailable']) * 1024 / _GIB:.1f} of"
            f" {int(sizes['MemTotal']) * 1024 / _GIB:.1f} GiB are free on the CPU"
        )
    except (OSError, KeyError):
        return "on the CPU"
