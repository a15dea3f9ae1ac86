"""What a trial takes of a GPU, and how many a GPU holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import standin_device
import torch
from helpers_cases import for_every

from pipeline.errors import OutOfMemory
from pipeline.selection import select_locally
from pipeline.specs import Recipe, SearchSpace
from pipeline.training import Inputs, dry_run, loop
from pipeline.training.dry_run import MOST, SAMPLES, WARM_STEPS, GpuNeed
from pipeline.utils.devices import busy_share

GIB = 1 << 30
TRAINING = {"epochs": 2, "batch_size": 16, "precision": "fp32"}


@for_every(
    ("memory", "busy", "expected"),
    [
        (9, 0.28, 3),
        (9, 0.1, MOST),
        (9, 0.0, MOST),
        (9, 0.5, 2),
        (9, 0.51, 1),
        (9, 1.0, 1),
        (9, None, 1),  # nobody tells how busy it is
        (15.2, 0.1, 4),  # 4 * 1.25 * 15.2 GiB = 95 % of 80
        (15.3, 0.1, 3),
        (30.4, 0.1, 2),
        (30.5, 0.1, 1),
        (79, 0.1, 1),
    ],
)
def test_a_gpu_holds_as_many_trials_as_it_has_memory_and_time_for(
    memory: float, busy: float | None, expected: int
) -> None:
    assert GpuNeed(int(memory * GIB), 80 * GIB, busy).trials_per_gpu() == expected


def test_what_a_trial_takes_is_told() -> None:
    need = GpuNeed(int(9.14 * GIB), 80 * GIB, 0.281)
    assert need.line() == "a trial takes 9.1 of 80.0 GiB and keeps the GPU 28% busy"
    assert replace(need, busy=None).line() == (
        "a trial takes 9.1 of 80.0 GiB, and NVIDIA's library does not tell how busy it keeps the"
        " GPU"
    )


# --- on the stand-in for a GPU --------------------------------------------------------------------


def with_recipe(inputs: Inputs, search: SearchSpace | None = None, **recipe: Any) -> Inputs:
    training = {**TRAINING, **recipe.pop("training", {})}
    changed = Recipe.model_validate({"biases": {}, **recipe, "training": training})
    changes = {"recipe": changed, "search": search or SearchSpace()}
    return inputs.with_task(inputs.task.model_copy(update=changes))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each training step."""
    made, step = [], loop._step

    def counted(model: Any, optimiser: Any, images: torch.Tensor, *others: Any) -> torch.Tensor:
        made.append(len(images))
        return step(model, optimiser, images, *others)

    monkeypatch.setattr(loop, "_step", counted)
    return made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[float | None]], None]:
    """A function: a device tells these shares, whenever it is looked at."""

    def tell(shares: Iterator[float | None]) -> None:
        monkeypatch.setattr(dry_run, "busy_share", lambda device: next(shares))
        monkeypatch.setattr(dry_run, "SAMPLE_SECONDS", 0)

    return tell


def test_where_nobody_tells_how_busy_a_gpu_is_a_trial_has_it_alone(
    standin: str, tiny_inputs: Inputs, steps: list[int]
) -> None:
    assert busy_share(standin) is None, "NVML knows nothing of it"
    inputs = with_recipe(tiny_inputs)
    dry_run.dry_run(inputs, None, standin)  # tables of levels are kept
    before = standin_device.allocated_bytes()
    steps.clear()
    need = dry_run.dry_run(inputs, None, standin)
    assert steps == [TRAINING["batch_size"]] * WARM_STEPS
    assert need.busy is None
    assert need.trials_per_gpu() == 1
    assert need.total_bytes == standin_device.limit_bytes()
    assert need.memory_bytes > before
    assert standin_device.allocated_bytes() == before, "all of it is given back"


def test_memory_is_that_of_a_step_and_of_a_validation(
    standin: str, tiny_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory(batch_size: int) -> int:
        inputs = with_recipe(tiny_inputs, training={"batch_size": batch_size})
        return dry_run.dry_run(inputs, None, standin).memory_bytes

    validated = memory(1)
    monkeypatch.setattr(dry_run, "_validate", lambda *given: None)
    assert memory(1) < memory(8) < memory(64)
    assert memory(1) < validated


def test_a_gpu_is_looked_at_after_the_first_steps(
    standin: str,
    tiny_inputs: Inputs,
    steps: list[int],
    told: Callable[[Iterator[float | None]], None],
) -> None:
    told(iter([1.0, 0.1, 0.2, 0.3, 0.4, 0.5]))
    need = dry_run.dry_run(with_recipe(tiny_inputs), None, standin)
    assert need.busy == pytest.approx(0.3)
    assert len(steps) == WARM_STEPS + SAMPLES
    told(iter([0.1, 0.2, None]))
    assert dry_run.dry_run(with_recipe(tiny_inputs), None, standin).busy == pytest.approx(0.2)


def test_all_parts_of_the_space_and_the_teacher_are_tried_and_the_busiest_counts(
    standin: str, tiny_inputs: Inputs, told: Callable[[Iterator[float | None]], None]
) -> None:
    looks = SAMPLES + 1
    told(itertools.chain([0.1] * looks, [0.4] * looks, [0.2] * looks))
    search = SearchSpace(parts=("connections", "biases", "norms+biases"))
    inputs = with_recipe(tiny_inputs, search)
    selected = select_locally(tiny_inputs, 1)
    assert dry_run.dry_run(inputs, selected, standin).busy == pytest.approx(0.4)
    told(itertools.chain([0.1] * looks, [0.7] * looks))
    taught = with_recipe(tiny_inputs, training={"distill": 0.5})
    assert dry_run.dry_run(taught, None, standin).busy == pytest.approx(0.7)


def test_a_gpu_without_the_memory_for_one_image_is_an_error(
    standin: str, tiny_inputs: Inputs
) -> None:
    with standin_device.memory_left(5 << 17), pytest.raises(OutOfMemory):
        dry_run.dry_run(with_recipe(tiny_inputs), None, standin)


def test_a_library_that_cannot_tell_is_one_that_does_not_tell(
    standin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NVMLError(Exception):
        """NVML's own errors have no other base."""

    def refuse(device: torch.device) -> int:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(torch.get_device_module(standin), "utilization", refuse, raising=False)
    assert busy_share(standin) is None
    monkeypatch.setattr(torch.get_device_module(standin), "utilization", lambda device: 28)
    assert busy_share(standin) == 0.28


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_dry_run_on_a_gpu_measures_a_process_and_gives_its_memory_back(
    gpu: str, tiny_inputs: Inputs
) -> None:
    inputs = with_recipe(tiny_inputs, training={"precision": "bf16"})
    dry_run.dry_run(inputs, None, gpu)  # libraries keep some memory
    before = torch.cuda.memory_allocated(gpu)
    need = dry_run.dry_run(inputs, None, gpu)
    assert torch.cuda.memory_allocated(gpu) == before
    assert need.total_bytes == torch.cuda.get_device_properties(gpu).total_memory
    assert torch.cuda.max_memory_reserved(gpu) < need.memory_bytes < need.total_bytes
    assert need.busy is None or 0 <= need.busy <= 1
    assert 1 <= need.trials_per_gpu() <= MOST
    assert "GiB" in need.line()
