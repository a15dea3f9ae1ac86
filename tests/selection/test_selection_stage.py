"""The selection stage on a real Ray Train worker group: the same bytes from any number of workers,
and named errors.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers_stages import make_stages

from pipeline.cluster.session import is_connected
from pipeline.driver import stages
from pipeline.driver.stages import Stages
from pipeline.errors import DataError
from pipeline.selection import (
    read_selection,
    select,
    select_locally,
    select_locally_if_faster,
    stage,
)
from pipeline.selection.stage import died_each_time
from pipeline.specs import Selection, Task
from pipeline.training import Inputs

TOP_K = 3

# Ray's own processes and files are closed by Ray, some of them late.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.usefixtures("local_ray")
def test_three_workers_write_the_file_that_one_process_writes(
    tiny_task: Task, tiny_data: Path, tiny_inputs: Inputs, tmp_path: Path
) -> None:
    path = select(tiny_task, tiny_data, TOP_K, tmp_path / "three" / "selection", workers=3)
    here = tmp_path / "here" / "selection"
    assert select_locally_if_faster(tiny_inputs, TOP_K, here, workers=1)
    assert path.read_bytes() == here.read_bytes()
    for each in (path, here):
        assert list(each.parent.iterdir()) == [each], "nothing is left beside the file"
    expected, found = select_locally(tiny_inputs, TOP_K), read_selection(path)
    assert expected.keys() == found.keys()
    assert all(
        torch.equal(a, b)
        for name in expected
        for a, b in zip(expected[name], found[name], strict=True)
    )


@pytest.mark.usefixtures("local_ray")
def test_workers_select_by_activation_over_the_network(
    tiny_task: Task, tiny_data: Path, tiny_inputs: Inputs, tmp_path: Path
) -> None:
    task = tiny_task.model_copy(
        update={"selection": Selection(criterion="activation", level="network")}
    )
    path = select(task, tiny_data, TOP_K, tmp_path / "selection", workers=2)
    assert select_locally_if_faster(
        dataclasses.replace(tiny_inputs, task=task), TOP_K, tmp_path / "here", workers=1
    )
    assert path.read_bytes() == (tmp_path / "here").read_bytes()


def test_a_small_selection_is_made_here_and_a_large_one_is_left_to_workers(
    tiny_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "selection"
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(stage, "GROUP_SECONDS", 0)
        assert not select_locally_if_faster(tiny_inputs, TOP_K, path, workers=2)
        assert not path.exists()
        assert select_locally_if_faster(tiny_inputs, TOP_K, path, workers=1), "never slower"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    expected, found = select_locally(tiny_inputs, TOP_K), read_selection(path)
    assert all(
        torch.equal(a, b)
        for name in expected
        for a, b in zip(expected[name], found[name], strict=True)
    )
    assert [entry.name for entry in path.parent.iterdir()] == ["selection"]
    monkeypatch.setattr(stage, "GROUP_SECONDS", 60)
    assert select_locally_if_faster(tiny_inputs, TOP_K, path, workers=2)


def stages_on_cluster(workdir: Path) -> Stages:
    """The stages as on a cluster, on the Ray that runs."""
    assert is_connected()
    return make_stages(workdir, ray_is_private=False)


@pytest.mark.usefixtures("local_ray")
def test_on_a_cluster_one_worker_selects_what_is_small(
    tiny_data: Path, tiny_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here" / "selection"
    assert select_locally_if_faster(tiny_inputs, TOP_K, here, workers=1)
    for name in ("select", "select_locally_if_faster"):  # neither a group nor this process
        monkeypatch.setattr(stages, name, lambda *given, **named: pytest.fail("not by a worker"))
    path = stages_on_cluster(tmp_path / "work").select(tiny_inputs, tiny_data, TOP_K)
    assert path.read_bytes() == here.read_bytes()


@pytest.mark.usefixtures("local_ray")
def test_an_error_in_the_worker_that_selects_is_named(tiny_inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone"):
        stages_on_cluster(tmp_path / "work").select(tiny_inputs, tmp_path / "gone", TOP_K)


@pytest.mark.usefixtures("local_ray")
def test_a_group_selects_where_the_worker_says_that_it_is_faster(
    tiny_data: Path, tiny_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cluster = stages_on_cluster(tmp_path / "work")
    monkeypatch.setattr(on_cluster, "on_ray", lambda *given, **named: [(0, False)])
    path = on_cluster.select(tiny_inputs, tiny_data, TOP_K)
    expected, found = select_locally(tiny_inputs, TOP_K), read_selection(path)
    assert all(
        torch.equal(a, b)
        for name in expected
        for a, b in zip(expected[name], found[name], strict=True)
    )


@pytest.mark.usefixtures("local_ray")
def test_a_fault_that_one_worker_meets_ends_the_stage_in_words(
    tiny_task: Task, tiny_data: Path, tmp_path: Path
) -> None:
    """The first shard is damaged after preparation. It is one batch, so only rank 0 reads it; the
    other rank's shards are whole.
    """
    task = tiny_task.model_copy(update={"selection": Selection(batch_size=64)})
    damaged = tmp_path / "data"
    shutil.copytree(tiny_data, damaged)
    shard = damaged / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"train-000000\.tar: damaged"):
        select(task, damaged, TOP_K, tmp_path / "out" / "selection", workers=2)
    assert time.monotonic() - started < 200, "no rank waits half an hour for another's sums"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_selection_that_is_there_is_used_without_work(
    tiny_task: Task, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.torch import TorchTrainer

    monkeypatch.setattr(TorchTrainer, "fit", lambda self: pytest.fail("no worker is needed"))
    path = tmp_path / "selection"
    path.write_bytes(b"kept as it is")
    assert select(tiny_task, tiny_data, TOP_K, path, workers=2) == path
    assert path.read_bytes() == b"kept as it is"


def test_workers_ended_for_want_of_memory_are_said_to_be() -> None:
    """As Ray words it: advice on Ray's own settings would not help a user of taskpack."""
    task = Task.model_validate(
        {"name": "flowers", "data": {"format": "digits"}, "backbone": {"model": "m"}}
    )
    failure = (
        "Worker was killed\nRefer to the documentation on how to address the out of memory issue:"
        " Set max_restarts"
    )
    assert (
        str(died_each_time(task, failure))
        == "flowers: the selection's workers were ended three times, because their node ran out of"
        " memory; lower selection.batch_size (it is 32), or give fewer --selection-workers"
    )
    assert str(died_each_time(task, "a\nthe node left")).endswith(
        "died three times; last: the node left"
    )
