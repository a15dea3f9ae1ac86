"""How busy a process keeps its device, and how long it waits for images."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.data.reader import WAITED
from pipeline.utils.devices import (
    busy_share,
    forget_peak,
    is_accelerator,
    largest_memory_bytes,
)

SAMPLE_SECONDS = 1.0
BUSY = 0.5
"""Below this share of the time, a GPU is worth a warning."""
MOSTLY = 0.3
"""From this share of the time on, waiting for images is what holds a GPU up."""
_SHORT_SECONDS = 30
"""A trial shorter than this says nothing about longer ones."""


@dataclass(frozen=True)
class Usage:
    """What a process did with its time so far.

    Attributes:
        seconds: since it was first measured.
        waiting: share of the time in which it waited for images.
        gpu_busy: share of the time in which its GPU computed, for this process or for others; None
            without a GPU, or where the driver does not tell.
        gpu_memory_bytes: the most of the GPU's memory that its tensors took; None without a GPU.
    """

    seconds: float
    waiting: float
    gpu_busy: float | None = None
    gpu_memory_bytes: int | None = None

    def warning(self) -> str:
        """What holds a GPU up that is busy less than half of the time; empty if none is."""
        if self.gpu_busy is None or self.gpu_busy >= BUSY or self.seconds < _SHORT_SECONDS:
            return ""
        found = f"the GPU was busy for {self.gpu_busy:.0%} of the time"
        if self.waiting >= MOSTLY:
            return (
                f"{found} and waited for images for {self.waiting:.0%}: give a trial more CPUs"
                " (--cpus-per-trial), or smaller images"
            )
        return (
            f"{found}, held up by its host: let more trials share it (a smaller --gpus-per-trial),"
            " or raise training.batch_size"
        )


class UsageMeter:
    """Measures a process from when it is made; see `measured`."""

    def __init__(self, device: str) -> None:
        self._device, self._started, self._waited = device, time.perf_counter(), WAITED.seconds
        self._busy: list[float] = []

    def usage(self) -> Usage:
        """The usage so far."""
        seconds = time.perf_counter() - self._started
        return Usage(
            seconds=round(seconds, 2),
            waiting=round((WAITED.seconds - self._waited) / seconds, 4) if seconds else 0.0,
            gpu_busy=round(sum(self._busy) / len(self._busy), 4) if self._busy else None,
            gpu_memory_bytes=largest_memory_bytes(self._device),
        )

    def sample(self) -> bool:
        """Look at the device once; False if it does not tell how busy it is."""
        share = busy_share(self._device)
        if share is not None:
            self._busy.append(share)
        return share is not None


@contextlib.contextmanager
def measured(device: str) -> Iterator[UsageMeter]:
    """Measure this process in this context; a thread looks at its GPU every second."""
    meter, over = UsageMeter(device), threading.Event()

    def look() -> None:
        while not over.wait(SAMPLE_SECONDS) and meter.sample():
            pass

    if not is_accelerator(device):
        yield meter
        return
    forget_peak(device)
    thread = threading.Thread(target=look, name="usage", daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        over.set()
        thread.join()
