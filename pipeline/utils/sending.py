"""Batches sent to a GPU while it computes on the one before.

Copies and kernels of one stream follow each other; those of two streams run beside each other,
unless one waits for the other. So batches are copied on a stream of their own, from pinned memory,
into two places in turn: a copy waits until the kernels are done with the batch before the last, and
kernels wait for the copy of theirs. The host waits for neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.utils.devices import device_module, is_accelerator, to_device

Batch = tuple[torch.Tensor, torch.Tensor]  # samples [B, ...], targets [B, ...]


def sent(batches: Iterable[Batch], device: str | torch.device) -> Iterator[Batch]:
    """The batches on a device, in their order. Their tensors hold until the next batch is asked
    for, and then take on other values.
    """
    module = device_module(device)
    if not (is_accelerator(device) and hasattr(module, "Stream")):
        for samples, targets in batches:
            yield to_device(samples, device), to_device(targets, device)
        return
    copying = module.Stream(device)
    places: list[_Place] = []
    for number, batch in enumerate(batches):
        places = places or [_Place.like(batch, device), _Place.like(batch, device)]
        if not places[number % 2].holds(batch):
            places[number % 2] = _Place.like(batch, device)
        place = places[number % 2]
        copying.wait_event(place.is_free)
        with module.stream(copying):
            copies = place.filled(batch)
        module.current_stream(device).wait_stream(copying)
        yield copies
        place.is_free = module.current_stream(device).record_event()


@dataclass
class _Place:
    """Memory of a device for a batch; from the event `is_free` on, no kernel uses it."""

    tensors: list[torch.Tensor]
    is_free: Any

    @classmethod
    def like(cls, batch: Batch, device: str | torch.device) -> _Place:
        """One that is as large as a batch."""
        tensors = [torch.empty_like(each, device=device) for each in batch]
        # Kernels that are still to run may use what the memory held before.
        return cls(tensors, device_module(device).current_stream(device).record_event())

    def holds(self, batch: Batch) -> bool:
        """Whether it is large enough for a batch of the same types and sizes."""
        return [(each.dtype, each.shape[1:]) for each in self.tensors] == [
            (each.dtype, each.shape[1:]) for each in batch
        ] and all(len(mine) >= len(each) for mine, each in zip(self.tensors, batch, strict=True))

    def filled(self, batch: Batch) -> Batch:
        """The batch, copied here on the current stream."""
        samples, targets = (
            mine[: len(each)].copy_(each.pin_memory(), non_blocking=True)
            for mine, each in zip(self.tensors, batch, strict=True)
        )
        return samples, targets
