"""How the trials of a run come to share GPUs: by a dry run of their own, once, or not at all.

Ray has a GPU here that nobody computes on: what a dry run finds on it is said by the tests.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import standin_device
from helpers_stages import make_stages

from pipeline.cluster.rank_group import TrialResources
from pipeline.driver import batch, gpu_shares
from pipeline.driver.gpu_shares import need_key
from pipeline.driver.stages import Placement
from pipeline.errors import OutOfMemory, TrainingError
from pipeline.specs import Biases, Recipe, SearchSpace, Task
from pipeline.training import Inputs
from pipeline.training.dry_run import GpuNeed

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
RAY_CPUS, RAY_GPUS = 3, 1
NEED = GpuNeed(9 << 30, 80 << 30, 0.28)
WHOLE, THIRD = TrialResources(3, 1), TrialResources(1, 1 / 3)
SPACE = SearchSpace(bias_bits=(1, 4, 8))


@pytest.fixture(scope="module", autouse=True)
def workers_know_this_file() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(module := sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def inputs(tiny_inputs: Inputs) -> Inputs:
    recipe = Recipe(biases=Biases(), training=tiny_inputs.task.recipe.training)
    changes = {"recipe": recipe, "search": SPACE}
    return tiny_inputs.with_task(tiny_inputs.task.model_copy(update=changes))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Callable[[], int]]:
    """A function: a dry run gives this, or what this returns; it gives a function for how many
    there were.
    """

    def give(outcome: Any) -> Callable[[], int]:
        notes = tmp_path / "dry-runs"

        def worker(
            task_json: str, data_folder: str, selection: Path | None, resources: TrialResources
        ) -> Any:
            assert resources == WHOLE
            assert len(ray.get_gpu_ids()) == 1
            with notes.open("a") as file:
                file.write(".")
            return outcome() if callable(outcome) else outcome

        monkeypatch.setattr(gpu_shares, "_worker", worker)
        return lambda: len(notes.read_text()) if notes.exists() else 0

    return give


def told_resources(resources: TrialResources) -> TrialResources:
    """What a fit is given."""
    return resources


def test_trials_share_a_gpu_as_a_dry_run_says_and_fits_have_it_alone(
    inputs: Inputs,
    tmp_path: Path,
    measured: Callable[[Any], Callable[[], int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    count, remarks = measured(NEED), list[str]()
    stages = make_stages(tmp_path, on_progress=lambda *told: remarks.append(told[3]))
    before = stages.tasks_at_once()
    with caplog.at_level(logging.INFO, "taskpack"):
        assert stages.trial_resources(inputs, None) == THIRD
    said = "3 trials per GPU: a trial takes 9.0 of 80.0 GiB and keeps the GPU 28% busy"
    assert remarks == [said]
    assert caplog.messages == [f"tiny: {said}"]
    assert list(stages.on_ray(told_resources, [()], 1)) == [(0, WHOLE)]
    assert stages.tasks_at_once() == before, "as many places, and each with fewer CPUs"
    assert count() == 1


def test_what_was_found_is_kept_for_later_runs_and_equal_tasks(
    inputs: Inputs, tmp_path: Path, measured: Callable[[Any], Callable[[], int]]
) -> None:
    count = measured(NEED)
    equal = inputs.with_task(inputs.task.model_copy(update={"name": "other", "seed": 5}))
    stages = make_stages(tmp_path)
    stages.ray_is_up = lambda: None  # type: ignore[method-assign]  # the main thread only waits
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda each: stages.trial_resources(each, None), [inputs, equal])
        assert list(both) == [THIRD, THIRD]
    assert stages.trials_per_gpu == {"tiny": 3, "other": 3}
    assert make_stages(tmp_path).trial_resources(inputs, None) == THIRD
    assert count() == 1
    (kept,) = (tmp_path / "gpus").iterdir()
    kept.write_text('{"memory": 3}')
    assert make_stages(tmp_path).trial_resources(inputs, None) == THIRD
    assert count() == 2, "a file that says something else is no answer"


def test_what_memory_or_time_depends_on_is_found_anew(inputs: Inputs) -> None:
    def key(gpus: tuple[str, ...] = ("H100",), **training: Any) -> str:
        recipe = inputs.task.recipe
        changed = recipe.changed(training=recipe.training.changed(**training))
        task = inputs.task.model_copy(update={"recipe": changed})
        return need_key(inputs.with_task(task), gpus)

    assert key() == key(learning_rate=0.5) == key(epochs=7)
    assert len({key(), key(("A100",)), key(batch_size=64), key(precision="bf16")}) == 4


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (lambda: OutOfMemory("one image is too much"), "one image is too much"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "its worker died"),
    ],
    ids=["memory", "a mistake", "death"],
)
def test_a_dry_run_that_fails_leaves_each_trial_a_gpu(
    fails: Callable[[], Any],
    reason: str,
    inputs: Inputs,
    tmp_path: Path,
    measured: Callable[[Any], Callable[[], int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(gpu_shares, "WORKER_RETRIES", 1)
    count, stages = measured(fails), make_stages(tmp_path)
    with caplog.at_level(logging.INFO, "taskpack"):
        assert stages.trial_resources(inputs, None) == WHOLE
    (message,) = caplog.messages
    assert message.startswith("tiny: 1 trial per GPU: a dry run failed: ")
    assert reason in message
    assert count() == (2 if "died" in reason else 1)
    assert not (tmp_path / "gpus").exists(), "the next run tries again"


def test_a_gpu_that_torch_cannot_use_is_left_to_the_trials_to_report(
    inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker itself, on a machine whose GPU is none."""
    with caplog.at_level(logging.INFO, "taskpack"):
        assert make_stages(tmp_path).trial_resources(inputs, None) == WHOLE
    (message,) = caplog.messages
    assert "a dry run failed: this process was given a GPU, and torch cannot use it" in message


def test_a_worker_makes_a_dry_run_on_the_gpu_that_it_is_given(
    standin: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.utils.devices.reserved_gpu", lambda: standin)
    given = inputs.task.model_dump_json(), str(inputs.data_folder), None
    found = gpu_shares._worker(*given, TrialResources(gpus=1))
    assert isinstance(found, GpuNeed), found
    assert found.total_bytes == standin_device.limit_bytes()
    with standin_device.memory_left(1000):
        assert isinstance(gpu_shares._worker(*given, TrialResources(gpus=1)), OutOfMemory)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (Placement(per_trial=(None, 1)), WHOLE),
        (Placement(per_trial=(None, 0.5)), TrialResources(1, 0.5)),
        (Placement(per_trial=(None, 0)), TrialResources(1, 0)),
        (Placement(per_trial=(2, None)), TrialResources(2, 1)),  # no CPUs for a second trial
    ],
    ids=["a whole one", "a half", "none", "many CPUs"],
)
def test_there_is_no_dry_run_where_it_would_change_nothing(
    placement: Placement,
    expected: TrialResources,
    inputs: Inputs,
    tmp_path: Path,
    measured: Callable[[Any], Callable[[], int]],
) -> None:
    count = measured(NEED)
    assert make_stages(tmp_path, placement=placement).trial_resources(inputs, None) == expected
    single = inputs.with_task(inputs.task.model_copy(update={"search": SearchSpace()}))
    assert make_stages(tmp_path).trial_resources(single, None) == WHOLE
    assert count() == 0


def test_a_study_asks_for_the_share(
    inputs: Inputs,
    tmp_path: Path,
    measured: Callable[[Any], Callable[[], int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole run up to its trials."""
    measured(NEED)
    asked: list[TrialResources] = []

    def study(
        task: Task, *given: Any, resources: Callable[[], TrialResources], **others: Any
    ) -> None:
        asked.append(resources())
        raise TrainingError("no trial is run here")

    monkeypatch.setattr(batch, "run_study", study)
    (outcome,) = batch.run_batch([inputs.task], tmp_path / "runs")
    assert str(outcome.error) == "no trial is run here"
    assert asked == [THIRD]
