"""How a trial reports what its time went to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers_cases import for_every

from pipeline.data.reader import WAITED
from pipeline.training import usage as usage_module
from pipeline.training.usage import Usage, UsageMeter, measured
from pipeline.utils.devices import busy_share


@for_every(
    ("found", "expected"),
    [
        (Usage(60, 0.9), ""),  # no GPU, or nobody knows
        (Usage(60, 0.9, gpu_busy=0.5), ""),
        (Usage(20, 0.9, gpu_busy=0.1), ""),  # too short to tell
        (
            Usage(60, 0.3, gpu_busy=0.49),
            "the GPU was busy for 49% of the time and waited for images for 30%: give a trial more"
            " CPUs (--cpus-per-trial), or smaller images",
        ),
        (
            Usage(60, 0.29, gpu_busy=0.12),
            "the GPU was busy for 12% of the time, held up by its host: let more trials share it (a"
            " smaller --gpus-per-trial), or raise training.batch_size",
        ),
    ],
)
def test_a_gpu_that_idles_is_explained(found: Usage, expected: str) -> None:
    assert found.warning() == expected


def test_waiting_for_images_is_counted_from_when_the_trial_begins() -> None:
    with ThreadPoolExecutor(1) as pool:
        WAITED.for_result(pool.submit(time.sleep, 0.05))
        meter = UsageMeter("cpu")
        WAITED.for_result(pool.submit(time.sleep, 0.2))
    time.sleep(0.2)
    found = meter.usage()
    assert found.waiting * found.seconds > 0.19  # both are rounded
    assert found.waiting < 1
    assert (found.gpu_busy, found.gpu_memory_bytes) == (None, None)


def test_a_gpu_is_looked_at_for_as_long_as_it_tells(
    standin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shares() -> Iterator[float | None]:
        yield from (0.2, 0.4, None)
        pytest.fail("looked at again")

    given = shares()
    monkeypatch.setattr(usage_module, "busy_share", lambda device: next(given))
    monkeypatch.setattr(usage_module, "largest_memory_bytes", lambda device: 123)
    monkeypatch.setattr(usage_module, "SAMPLE_SECONDS", 0.001)
    with measured(standin) as meter:
        time.sleep(0.1)
    found = meter.usage()
    assert replace(found, seconds=0, waiting=0) == Usage(0, 0, pytest.approx(0.3), 123)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_gpu_at_work_tells_so(gpu: str) -> None:
    """By NVIDIA's library, which the package nvidia-ml-py has."""
    matrix = torch.randn(4096, 4096, device=gpu)
    if busy_share(gpu) is None:
        pytest.skip("needs nvidia-ml-py, and a GPU that is not divided (MIG)")
    with measured(gpu) as meter:
        over = time.monotonic() + 4 * usage_module.SAMPLE_SECONDS
        while time.monotonic() < over:
            for _ in range(10):
                matrix @ matrix
            torch.cuda.synchronize()
    found = meter.usage()
    assert found.gpu_busy is not None
    assert 0.3 < found.gpu_busy <= 1
    assert found.gpu_memory_bytes is not None
    assert found.gpu_memory_bytes >= 2 * matrix.nbytes
