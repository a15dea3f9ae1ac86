"""Groups of ranks on Ray: had whole or not at all, ended as one, started again as one; a task
trained by two of them from data to pack.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from helpers_cli import new_workdir
from helpers_cluster import parent

from pipeline import api
from pipeline.adaptation.packing import from_pack
from pipeline.cluster.capacity import wait_for_room
from pipeline.cluster.rank_group import TrialResources, in_group
from pipeline.cluster.task_pool import Interrupted
from pipeline.cluster.tasks import WorkersDied, computed, ended_tasks
from pipeline.data import shards
from pipeline.errors import ClusterError, DataError, UnexpectedError
from pipeline.kinds import score
from pipeline.packs import read_pack
from pipeline.search.run_study import run_study
from pipeline.search.study import Study
from pipeline.search.trial_record import TrialJournal
from pipeline.specs import SearchSpace, Smoa, Task
from pipeline.training import Inputs, Ranks, evaluate, open_inputs
from pipeline.training.fit import PACK_FILE, read_fit

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
PAIR = TrialResources(ranks=2)


@pytest.fixture(scope="module", autouse=True)
def workers_know_this_file() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(module := sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


def exchange(said: int, folder: Path, resources: TrialResources, ranks: Ranks) -> list[list[int]]:
    """What both ranks say, after a while in which other groups could start."""
    heard = ranks.gathered(torch.tensor([said, ranks.rank])).tolist()
    time.sleep(0.5)
    ranks.total(0)
    return heard


def die_once(said: int, folder: Path, resources: TrialResources, ranks: Ranks) -> list[list[int]]:
    """The second rank dies, the first time."""
    ranks.total(0)
    if not ranks.is_first and not (folder / f"died-{said}").exists():
        (folder / f"died-{said}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return exchange(said, folder, resources, ranks)


def die(said: int, folder: Path, resources: TrialResources, ranks: Ranks) -> None:
    """The second rank dies each time."""
    with (folder / "tries").open("a") as tries:
        tries.write(str(ranks.rank))
    ranks.total(0)
    if not ranks.is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.total(0)


def fail(said: int, folder: Path, resources: TrialResources, ranks: Ranks) -> None:
    """The second rank meets an error that has a name."""
    ranks.total(0)
    if not ranks.is_first:
        raise DataError("a shard is missing")
    ranks.total(0)


def err(said: int, folder: Path, resources: TrialResources, ranks: Ranks) -> None:
    """The first rank fails by itself while the other waits for it."""
    if ranks.is_first:
        raise RuntimeError("a mistake of its own")
    ranks.total(0)


def err_later(said: int, folder: Path, resources: TrialResources, ranks: Ranks) -> None:
    """The second rank fails by itself, of something without a name, while the first waits for
    it.
    """
    with (folder / "tries").open("a") as tries:
        tries.write(str(ranks.rank))
    if not ranks.is_first:
        raise RuntimeError("a mistake of its own")
    ranks.total(0)


def stop(said: int, folder: Path, resources: TrialResources, ranks: Ranks) -> str:
    """The first rank needs no others any more, which would wait for it for ever."""
    if ranks.is_first:
        return "stopped"
    ranks.total(0)
    return "never"


def on_pairs(work: Any, folder: Path, groups: int = 1, retries: int = 1) -> list[Any]:
    """What each of so many groups of two gives."""

    def worker(*arguments: Any) -> Any:
        return in_group(work, arguments, PAIR)

    arguments = [(said, folder) for said in range(groups)]
    ended = dict(
        ended_tasks(worker, arguments, 1, 0, ranks=2, retries=retries, is_stopping=lambda: False)
    )
    return [ended[said] for said in range(groups)]


def all_is_given_back() -> bool:
    """Whether the three places of the cluster are free again, soon."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        held = [
            each for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"
        ]
        if not held and ray.available_resources().get("CPU") == 3:
            return True
        time.sleep(0.1)
    return False


def test_groups_that_do_not_fit_side_by_side_follow_each_other(tmp_path: Path) -> None:
    assert on_pairs(exchange, tmp_path, groups=3) == [[[said, 0], [said, 1]] for said in range(3)]
    assert all_is_given_back()


def test_a_group_that_loses_a_rank_starts_again_as_one(tmp_path: Path) -> None:
    assert on_pairs(die_once, tmp_path, groups=2) == [[[said, 0], [said, 1]] for said in range(2)]
    assert all_is_given_back()


def test_a_group_that_loses_ranks_again_and_again_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(WorkersDied):
        on_pairs(die, tmp_path, retries=1)
    assert sorted((tmp_path / "tries").read_text()) == ["0", "0", "1", "1"]
    assert all_is_given_back()


def test_an_error_with_a_name_on_any_rank_is_that_of_the_group(tmp_path: Path) -> None:
    started = time.monotonic()
    (error,) = on_pairs(fail, tmp_path)
    assert isinstance(error, DataError)
    assert str(error) == "a shard is missing"
    assert time.monotonic() - started < 200, "no rank waits half an hour for the others"
    assert all_is_given_back()


def test_an_error_of_the_first_rank_alone_is_not_blamed_on_the_others(tmp_path: Path) -> None:
    started = time.monotonic()
    (error,) = on_pairs(err, tmp_path)
    assert isinstance(error, UnexpectedError)
    assert str(error) == "RuntimeError: a mistake of its own"
    assert "in err" in error.details
    assert time.monotonic() - started < 200, "no rank waits half an hour for the others"
    assert all_is_given_back()


def test_a_nameless_error_of_another_rank_is_no_death_and_not_tried_again(tmp_path: Path) -> None:
    (error,) = on_pairs(err_later, tmp_path, retries=5)
    assert isinstance(error, UnexpectedError)
    assert str(error) == "RuntimeError: a mistake of its own"
    assert sorted((tmp_path / "tries").read_text()) == ["0", "1"]
    assert all_is_given_back()


def test_a_group_ends_with_its_first_rank(tmp_path: Path) -> None:
    assert on_pairs(stop, tmp_path) == ["stopped"]
    assert all_is_given_back()


def test_a_cluster_of_fixed_size_refuses_more_ranks_than_it_can_ever_hold() -> None:
    wait_for_room(3, 1, 0, lambda: False)
    with pytest.raises(
        ClusterError,
        match=(
            r"for each of 2 ranks, and the nodes \(3 CPUs and 0 GPUs\) have room for 1; lower"
            r" --ranks-per-trial"
        ),
    ):
        wait_for_room(2, 2, 0, lambda: False)


def test_a_cluster_of_fixed_size_refuses_what_no_node_has() -> None:
    started = time.monotonic()
    wait_for_room(1, 3, 0, lambda: False)
    with pytest.raises(
        ClusterError,
        match=(
            r"asks for 4 CPUs and 0 GPUs, which no node has \(3 CPUs and 0 GPUs\); lower"
            r" --cpus-per-trial"
        ),
    ):
        wait_for_room(1, 4, 0, lambda: False)
    with pytest.raises(ClusterError, match="asks for 1 CPUs and 1 GPUs"):
        wait_for_room(1, 1, 1, lambda: False)
    assert time.monotonic() - started < 10


def test_a_study_ends_and_retries_groups_as_it_does_single_trials(
    tiny_task: Task,
    tiny_data: Path,
    tiny_inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second rank of the first trial is killed; the second trial is stopped after its first
    epoch; the third runs in the processes left.
    """
    space = SearchSpace(learning_rate=(1e-3, 2e-3, 3e-3))
    training = tiny_task.recipe.training.model_copy(update={"epochs": 3})
    recipe = tiny_task.recipe.model_copy(update={"connections": None, "training": training})
    task = tiny_task.model_copy(update={"recipe": recipe, "search": space})
    monkeypatch.setattr(Study, "_is_dominated", lambda study, slot, curve, errors: slot == 1)
    killed: list[int] = []

    def kill_one(study: Study) -> None:
        if study.epochs_done() and not killed:
            killed.extend(other_ranks())
            for process in killed:
                os.kill(process, signal.SIGKILL)

    records = run_study(
        task,
        tiny_data,
        None,
        TrialJournal(tmp_path),
        size_of=lambda recipe: 1,
        resources=lambda: PAIR,
        on_progress=kill_one,
    )
    assert len(killed) == 1
    assert [(record.state, len(record.curve)) for record in records] == [
        ("complete", 3),
        ("stopped", 1),
        ("complete", 3),
    ]
    assert all_is_given_back()


def other_ranks() -> list[int]:
    """The processes of this Ray, whose raylet is a child of this process, that are at work as ranks
    but the first.
    """
    titles = {
        int(path.parent.name): path.read_bytes()
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists()
    }
    return [
        process
        for process, title in titles.items()
        if title.startswith(b"ray::_other") and parent(parent(process)) == os.getpid()
    ]


@pytest.mark.parametrize(
    "kind", ["classification", pytest.param("segmentation", marks=pytest.mark.slow)]
)
def test_two_ranks_take_a_task_from_data_to_pack(
    kind: str,
    tiny_task: Task,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More ranks are asked for than the task has shards; early trials end others."""
    workdir = new_workdir(tmp_path_factory.getbasetemp(), tmp_path)
    monkeypatch.setattr(shards, "SHARD_SIZE_BYTES", 200_000)
    recipe = tiny_task.recipe.model_copy(update={"smoa": Smoa(experts=2, width=4, bits=4)})
    task = tiny_task.model_copy(update={"recipe": recipe, "search": SearchSpace(bits=(4, 8))})
    if kind == "segmentation":
        masks = {"data": {**task.data.model_dump(), "kind": "shapes"}, "metric": "mIoU"}
        content = task.model_dump(exclude={"selection"}) | masks | {"kind": kind}
        task = Task.model_validate({**content, "selection": {"batch_size": 16}})
    remarks: list[str] = []
    (outcome,) = api.run(
        [task],
        workdir=workdir,
        ranks_per_trial=3,
        on_progress=lambda *told: remarks.append(told[3]),
    )
    assert outcome.error is None
    assert outcome.registered is not None
    assert outcome.registered.tags["device"].startswith("2 x CPU (")
    assert "2 of 3 ranks train: a shard is read by one, and there are 2" in remarks
    assert [trial.state for trial in outcome.trials] == ["complete", "complete"]
    (folder,) = workdir.glob("studies/*/fits/*")
    result, inputs = read_fit(folder), open_inputs(task, workdir / "data" / task.name)
    model = from_pack(read_pack(folder / PACK_FILE), inputs.backbone)
    assert result is not None
    expected = score(
        inputs.metric, evaluate(model, inputs.reader("test"), inputs.splits["test"], inputs.kind)
    )
    assert (
        result.metric,
        result.test_metric,
        result.test_metric_stderr,
        result.test_samples,
    ) == astuple(expected)
    assert all_is_given_back()


def test_what_takes_the_driver_too_long_is_computed_by_a_worker_that_waits_for_no_trial() -> None:
    assert computed(os.getpid, [], lambda: False, retries=0) != os.getpid()
    cpus = int(ray.cluster_resources()["CPU"])
    busy = ray.remote(num_cpus=cpus)(lambda: time.sleep(600)).remote()
    try:
        time.sleep(0.5)
        assert computed(divmod, [7, 2], lambda: False, retries=0) == (3, 1)
        with pytest.raises(Interrupted):
            computed(time.sleep, [600], lambda: True, retries=0)
    finally:
        ray.cancel(busy, force=True)
