"""GPUs that torch cannot use end a run on a cluster before it begins, once.

Ray has a GPU here that does not exist, so a worker finds that torch cannot use them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from helpers_cli import new_workdir, write_task
from helpers_stages import make_stages

from pipeline.cluster import gpu_check
from pipeline.cluster.capacity import of_kind
from pipeline.cluster.gpu_check import check_gpus_of_workers
from pipeline.driver.batch import run_batch
from pipeline.driver.stages import Placement
from pipeline.errors import ClusterError
from pipeline.specs.task_files import load_task

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
RAY_CPUS, RAY_GPUS = 1, 1
UNUSABLE = "this process was given a GPU, and torch cannot use it: .*--gpus-per-trial 0"


@pytest.fixture(scope="module", autouse=True)
def workers_know_this_file() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(module := sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A function that tells how often workers were asked."""
    calls = []

    def count() -> list[str]:
        calls.append(1)
        return [""]

    monkeypatch.setattr(gpu_check, "gpu_kinds", count)
    return lambda: len(calls)


def test_a_run_ends_before_its_tasks_are_prepared(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    tasks = [load_task(write_task(tmp_path, name=name)) for name in ("bars", "dots")]
    workdir, said = new_workdir(tmp_path_factory.getbasetemp(), tmp_path), list[str]()
    with pytest.raises(ClusterError, match=UNUSABLE):
        run_batch(tasks, workdir, address="auto", on_progress=lambda task, *_: said.append(task))
    assert not said
    assert not list(workdir.glob("data/*"))


def test_a_run_on_cpus_and_a_private_ray_do_not_ask(
    tmp_path: Path, asked: Callable[[], int]
) -> None:
    for options in (
        {"ray_is_private": False, "placement": Placement(per_trial=(None, 0))},
        {"ray_is_private": True},
    ):
        make_stages(tmp_path, **options).check_gpus()
    assert asked() == 0
    with pytest.raises(ClusterError, match=UNUSABLE):
        make_stages(tmp_path, ray_is_private=False).check_gpus()
    assert asked() == 1


def test_gpus_that_work_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_fault", lambda: None)
    check_gpus_of_workers()


def test_a_worker_that_dies_says_nothing_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        import os

        os._exit(1)

    monkeypatch.setattr(gpu_check, "_fault", die)
    check_gpus_of_workers()


def test_nobody_waits_for_trials_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_SECONDS", 0.5)

    @ray.remote(num_cpus=0, num_gpus=1)
    class Holder:
        def is_here(self) -> bool:
            return True

    holder = Holder.remote()
    assert ray.get(holder.is_here.remote())
    started = time.monotonic()
    check_gpus_of_workers()
    assert time.monotonic() - started < 10
    ray.kill(holder)


def test_a_worker_is_asked_on_a_node_of_the_kind() -> None:
    assert of_kind("") == {}
    assert of_kind("H100") == {"accelerator_type:H100": 0.001}
    assert of_kind("A100, H100") == {"accelerator_type:A100": 0.001}
