"""What a run asks of a cluster: how many trials its nodes hold, how many tasks that makes, what is
refused.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from helpers_cases import for_every
from helpers_stages import make_stages

from pipeline.cluster import capacity as cluster
from pipeline.cluster import rank_group
from pipeline.cluster.capacity import Node, check_holds_group
from pipeline.driver import stages
from pipeline.driver.stages import Placement, Stages
from pipeline.errors import ClusterError, SpecError
from pipeline.search.proposer import LAG
from pipeline.training import Inputs


@pytest.mark.parametrize(
    ("node", "asked", "held"),
    [
        (Node(4, 0), (1, 0), 4),
        (Node(4, 0), (1.5, 0), 2),
        (Node(1, 0), (0.1, 0), 10),
        (Node(16, 2), (1, 0.25), 8),
        (Node(3, 2), (1, 0.25), 3),
        (Node(16, 0), (1, 1), 0),
        (Node(0, 0), (1, 0), 0),
    ],
    ids=[
        "CPUs",
        "and a half",
        "tenths",
        "quarters of GPUs",
        "CPUs run out first",
        "no GPU",
        "a head that takes no work",
    ],
)
def test_a_node_holds_as_many_trials_as_fit(
    node: Node, asked: tuple[float, float], held: int
) -> None:
    assert node.places(*asked) == held


def stages_on(nodes: list[Node], placement: Placement, monkeypatch: pytest.MonkeyPatch) -> Stages:
    monkeypatch.setattr(cluster, "running_nodes", lambda: nodes)
    monkeypatch.setattr(stages, "is_connected", lambda: True)
    monkeypatch.setattr(stages, "scales_itself", lambda: False)
    return make_stages(Path("runs"), placement=placement)


@pytest.mark.parametrize(
    ("nodes", "per_trial", "tasks"),
    [
        ([Node(2, 0)], (None, None), 2),
        ([Node(0, 0)], (None, None), 1),
        ([Node(4, 0)], (None, None), 2),
        ([Node(8, 0)] * 2, (None, None), 5),
        ([Node(8, 0)] * 2, (4, None), 2),
        ([Node(64, 8)] * 4, (None, None), 9),
        ([Node(64, 8)] * 4, (None, 0.5), 17),
    ],
    ids=[
        "a laptop",
        "no worker yet",
        "one study fills it",
        "two nodes",
        "large trials",
        "GPUs by default",
        "two trials a GPU",
    ],
)
def test_as_many_tasks_run_as_their_trials_fill_the_cluster_and_one_more(
    nodes: list[Node],
    per_trial: tuple[float | None, float | None],
    tasks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert stages_on(nodes, Placement(per_trial=per_trial), monkeypatch).tasks_at_once() == tasks
    assert (
        stages_on(
            nodes, Placement(per_trial=per_trial, tasks_at_once=3), monkeypatch
        ).tasks_at_once()
        == 3
    )


@for_every(
    ("nodes", "per_trial", "expected"),
    [
        ([Node(64, 0)], (None, None), (1, 0)),  # it computes on its CPU: two trials beat one
        ([Node(64, 8)], (None, None), (8, 1)),
        ([Node(64, 8)], (None, 0.25), (2, 0.25)),
        ([Node(64, 8)], (None, 0), (1, 0)),
        ([Node(64, 8)], (3, None), (3, 1)),
        ([Node(64, 8), Node(16, 4), Node(32, 0)], (None, None), (4, 1)),  # it fits the smallest
        ([Node(4, 8)], (None, None), (1, 1)),
        ([], (None, 1), (1, 1)),  # a cluster that has yet to start its nodes
    ],
)
def test_a_trial_takes_its_share_of_the_cpus_of_a_node_with_gpus(
    nodes: list[Node],
    per_trial: tuple[float | None, float | None],
    expected: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = stages_on(nodes, Placement(per_trial=per_trial), monkeypatch)
    assert driver._per_trial() == expected


@for_every(
    ("nodes", "cpus", "trials", "expected"),
    [
        ([Node(64, 8)], None, 1000, 8),
        ([Node(64, 8)], 3, 1000, 2),
        ([Node(64, 8)], 9, 1000, 1),
        ([Node(64, 8), Node(8, 4), Node(256, 0)], None, 1000, 2),  # the fewest CPUs per GPU
        ([Node(64, 8)], None, 8, 1),  # one each leaves no GPU idle
        ([Node(64, 8)], None, 9, 2),
        ([Node(32, 1)], None, 3, 3),
        ([Node(2, 4)], None, 1000, 1),
    ],
)
def test_trials_share_a_gpu_only_as_far_as_there_are_cpus_and_trials(
    nodes: list[Node],
    cpus: float | None,
    trials: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "running_nodes", lambda: nodes)
    assert cluster.most_trials_per_gpu(cpus, trials) == expected


def test_more_tasks_run_where_trials_are_known_to_share_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = stages_on([Node(64, 8)] * 4, Placement(), monkeypatch)
    driver.trials_per_gpu = {"one": 1, "other": 3}
    assert driver.tasks_at_once() == 17, "as many as with two trials a GPU"
    assert driver._per_trial(3) == (2, 1 / 3)


@for_every(
    ("tasks", "trials"),
    [(0, 64), (1, 64), (3, 64 / 3), (16, 4), (50, LAG)],  # of 32 places, twice as many
)
def test_tasks_share_the_cluster_for_trials_that_need_not_wait(
    tasks: int, trials: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, looks = stages_on([Node(64, 8)] * 4, Placement(), monkeypatch), list[float]()
    monkeypatch.setattr(stages, "places", lambda cpus, gpus: looks.append(gpus) or 32)
    driver.pool.running = tasks
    assert [driver.trials_at_once_of_each() for _ in range(20)] == [trials] * 20
    assert looks == [1], "a look at the cluster takes the driver's time"


def test_all_trials_ask_a_cluster_that_grows_on_demand_for_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = stages_on([Node(64, 8)], Placement(), monkeypatch)
    monkeypatch.setattr(stages, "scales_itself", lambda: True)
    assert driver.trials_at_once_of_each() == math.inf


def test_trials_share_no_gpus_of_several_kinds(
    tiny_inputs: Inputs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [Node(8, 1, "A10"), Node(32, 1, "H100"), Node(8, 0)]
    driver = stages_on(nodes, Placement(), monkeypatch)
    driver.task_count = 8
    with caplog.at_level(logging.INFO, "taskpack"):
        assert driver.trial_resources(tiny_inputs, None) == rank_group.TrialResources(8, 1)
    said = "1 trial per GPU: the cluster has several kinds of GPUs (A10, H100)"
    assert caplog.messages == [f"tiny: {said}"]


def test_several_ranks_have_a_gpu_each(
    tiny_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = stages_on([Node(64, 8)], Placement(ranks_per_trial=2), monkeypatch)
    monkeypatch.setattr(driver.gpu_shares, "need", lambda *given: pytest.fail("not asked for"))
    assert driver.trial_resources(tiny_inputs, None) == rank_group.TrialResources(8, 1, 2)


def test_ray_names_the_kind_of_a_nodes_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"CPU": 16.0, "GPU": 2.0, "accelerator_type:H100": 1.0, "memory": 1e9}
    monkeypatch.setattr(
        "ray.nodes",
        lambda: [
            {"Alive": True, "Resources": node},
            {"Alive": True, "Resources": {"CPU": 4.0}},
            {"Alive": False, "Resources": node},
        ],
    )
    assert cluster.running_nodes() == [Node(16, 2, "H100"), Node(4, 0)]
    assert cluster.gpu_kinds() == ["H100"]


def test_one_task_runs_until_ray_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = stages_on([Node(64, 0)], Placement(), monkeypatch)
    monkeypatch.setattr(stages, "is_connected", lambda: False)
    assert driver.tasks_at_once() == 1


def test_a_trial_takes_no_more_than_its_share_of_a_gpus_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: limits.append(given)
    )
    for gpus in (0, 1, 0.25):
        with rank_group.group(print, (), rank_group.TrialResources(gpus=gpus)):
            pass
    assert limits == [(0.25, 0)]


def test_a_trial_takes_one_gpu_or_a_share_of_one() -> None:
    for gpus in (None, 0, 0.25, 1):
        assert Placement(per_trial=(None, gpus)).per_trial[1] == gpus
    with pytest.raises(
        SpecError,
        match=(
            r"given 2; a process uses one GPU: give 1, or a share of one such as 0\.5\. For more"
            r" .*, give --ranks-per-trial"
        ),
    ):
        Placement(per_trial=(1, 2))


def test_ranks_do_not_share_a_gpu() -> None:
    for gpus in (None, 0, 1):
        assert Placement(per_trial=(None, gpus), ranks_per_trial=2).ranks_per_trial == 2
    with pytest.raises(
        SpecError,
        match=(
            r"--gpus-per-trial: given 0\.5 with --ranks-per-trial 2; .*: give 1 or 0, or one rank a"
            r" trial"
        ),
    ):
        Placement(per_trial=(None, 0.5), ranks_per_trial=2)


def test_trials_of_several_ranks_take_as_many_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        stages_on([Node(8, 0)] * 2, Placement(ranks_per_trial=4), monkeypatch).tasks_at_once() == 2
    )


def test_a_selection_with_more_workers_than_the_cluster_holds_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "running_nodes", lambda: [Node(2, 0), Node(1, 0)])
    monkeypatch.setattr(cluster, "scales_itself", lambda: False)
    check_holds_group(3, 1, 0)
    with pytest.raises(
        ClusterError,
        match=r"--selection-workers: given 4, the cluster has room for 3, each with 1 CPU$",
    ):
        check_holds_group(4, 1, 0)
    monkeypatch.setattr(cluster, "scales_itself", lambda: True)
    check_holds_group(4, 1, 0)
