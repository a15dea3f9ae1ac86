"""Batches on their way to a GPU: none is lost, mixed up or written over while it is used.

That no kernel and no copy is too early is shown on streams that know what has happened before what,
on the stand-in for a GPU, and on a GPU that is kept waiting.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import standin_device
import torch

from pipeline.utils import sending
from pipeline.utils.sending import Batch, sent

SIZES = (4, 4, 4, 0, 4, 3, 8, 4, 2)


def numbered(pixels: int = 5) -> list[Batch]:
    """Batches of several sizes, each full of its number."""
    return [
        (torch.full((size, pixels), number, dtype=torch.uint8), torch.full((size,), number))
        for number, size in enumerate(SIZES)
    ]


def test_a_cpu_gets_the_batches_themselves() -> None:
    given = numbered()
    for mine, theirs in zip(given, sent(iter(given), "cpu"), strict=True):
        assert all(one is other for one, other in zip(mine, theirs, strict=True))


def test_the_host_waits_for_no_copy(standin: str) -> None:
    with standin_device.counted() as counts:
        taken = [(images.clone(), targets.clone()) for images, targets in sent(numbered(), standin)]
    assert not counts["synchronisation"]
    assert counts["copy to device"] == 2 * len(SIZES)
    for mine, theirs in zip(numbered(), taken, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert other.device.type == standin
            assert other.dtype == one.dtype
            assert torch.equal(other.cpu(), one)


def test_two_batches_are_on_the_device_at_most(standin: str) -> None:
    before, taken = standin_device.allocated_bytes(), []
    batches = [(torch.zeros(1000, 100), torch.zeros(1000))] * 10
    for _batch in sent(batches, standin):
        taken.append(standin_device.allocated_bytes() - before)
    del _batch
    assert max(taken) < 2.1 * 4 * 1000 * 101
    assert standin_device.allocated_bytes() - before < 1000


def test_batches_are_taken_one_by_one(standin: str) -> None:
    """A batch that is not decoded yet does not hold up the step before it."""
    asked: list[int] = []

    def ask() -> Iterator[Batch]:
        for number, batch in enumerate(numbered()):
            asked.append(number)
            yield batch

    for number, _ in enumerate(sent(ask(), standin)):
        assert asked == list(range(number + 1))


class Stream:
    """Knows, for every stream, how many of its operations have ended before its own next one."""

    running: list[Stream]

    def __init__(self, device: object = None) -> None:
        self.known: Counter[Stream] = Counter()

    def operate(self) -> tuple[Stream, int]:
        """An operation, as its stream and its number there."""
        self.known[self] += 1
        return self, self.known[self]

    def comes_after(self, operation: tuple[Stream, int]) -> bool:
        return self.known[operation[0]] >= operation[1]

    def record_event(self) -> Counter[Stream]:
        return Counter(self.known)

    def wait_event(self, event: Counter[Stream]) -> None:
        self.known |= event

    def wait_stream(self, other: Stream) -> None:
        self.known |= other.known


def test_copies_and_kernels_wait_for_each_other_where_they_must(
    standin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing = Stream()
    running, copies = [computing], list[tuple[Stream, int]]()
    last_use: dict[int, tuple[Stream, int]] = {}  # by address
    beside = 0

    @contextlib.contextmanager
    def on_stream(stream: Stream) -> Iterator[None]:
        running.append(stream)
        yield
        running.pop()

    filled = sending._Place.filled

    def copied(place: Any, batch: Batch) -> Batch:
        for tensor in place.tensors:
            if (use := last_use.get(tensor.data_ptr())) is not None:
                assert running[-1].comes_after(use), "the batch there is still used"
        copies.append(running[-1].operate())
        return filled(place, batch)

    module = torch.get_device_module(standin)
    for name, value in (
        ("Stream", Stream),
        ("stream", on_stream),
        ("current_stream", lambda device=None: running[-1]),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sending._Place, "filled", copied)
    step: tuple[Stream, int] | None = None
    for images, targets in sent([(torch.ones(4, 5), torch.ones(4))] * 8, standin):
        assert running[-1] is computing
        assert copies[-1][0] is not computing
        assert computing.comes_after(copies[-1]), "the batch is not here yet"
        beside += step is not None and not copies[-1][0].comes_after(step)
        step = computing.operate()
        last_use |= {images.data_ptr(): step, targets.data_ptr(): step}
    assert beside == 7, "a copy does not wait for the step before it"


@pytest.mark.gpu
def test_a_gpu_that_lags_behind_computes_on_every_batch(gpu: str) -> None:
    sums = []
    batches = [
        (torch.full((size, 1 << 20), number, dtype=torch.uint8), torch.arange(size) + number)
        for number, size in enumerate([1, 3, 3, 2] * 6)
    ]
    for images, targets in sent(batches, gpu):
        torch.cuda._sleep(5_000_000)
        sums.append((images.sum(dtype=torch.int64), targets.sum()))
    assert [(int(one), int(other)) for one, other in sums] == [
        (int(images.sum(dtype=torch.int64)), int(targets.sum())) for images, targets in batches
    ]
