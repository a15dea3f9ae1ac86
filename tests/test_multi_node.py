"""Several tasks on several nodes: the packs of a plain loop in one process, whatever is lost on the way, and nothing finished done twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_cli import TASK, new_workdir, write_task
from helpers_cluster import TestCluster, results, start, test_cluster

from pipeline.adaptation.packing import SizePlanner
from pipeline.data import prepare
from pipeline.search.champion import choose_champion
from pipeline.search.proposer import make_proposer
from pipeline.search.record import TrialJournal
from pipeline.search.study import Study
from pipeline.search.trial import run_trial
from pipeline.selection import read_selection, select_here, write_selection
from pipeline.spec import Task
from pipeline.task_files import load_tasks
from pipeline.training import open_inputs
from pipeline.training.fit import fit
from pipeline.workspace import Workspace

pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TRAINING = {"epochs": 3, "batch_size": 16, "precision": "fp32"}
TRIALS = 6  # four of bars, two of dots


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, one of which trains connections."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, name="bars", recipe={**TASK["recipe"], "training": TRAINING}, search={"bits": [4, 8], "top_k": [1, 2]})
    linear = {"connections": None, "training": TRAINING}
    write_task(folder, name="dots", data={**TASK["data"], "kind": "counting"}, recipe=linear, search={"head_bits": [4, 8]})
    return folder


def run_plainly(task: Task, workspace: Workspace) -> None:
    """A task from data to pack in this process, one thing after another."""
    prepare(task, data := workspace.data(task.name))
    inputs = open_inputs(task, data)
    top_k = task.search.max_top_k(task.recipe)
    folder, selected = workspace.study(inputs, top_k), None
    if top_k:
        write_selection(select_here(inputs, top_k), path := workspace.selection(inputs, top_k))
        selected = read_selection(path)
    planner = SizePlanner(task, inputs.backbone, inputs.index.classes, selected)
    study = Study(task, make_proposer(task, planner.size_bytes), TrialJournal(folder.root / "trials"), len(inputs.splits["val"]))
    while (slot := study.next_slot()) is not None:
        for epoch, (score, _) in enumerate(run_trial(inputs, study.slots[slot].recipe, selected), start=1):
            if not study.report(slot, epoch, score.accuracy):
                break
        study.finish(slot, 0.0, None)
    champion = choose_champion(study.all_records(), task.budget)
    fit(inputs, task.search.recipe(task.recipe, champion.point), selected, folder.fit(champion.id))


@pytest.fixture(scope="module")
def expected(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Selections and packs, as a plain loop makes them."""
    workdir = tmp_path_factory.mktemp("plain")
    for task in load_tasks([tasks]):
        run_plainly(task, Workspace(workdir))
    return results(workdir)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with test_cluster(tmp_path_factory.mktemp("notes"), nodes=2) as made:
        yield made


def test_nodes_lost_in_every_stage_change_nothing(
    cluster: TestCluster, tasks: Path, expected: dict[str, bytes], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cluster.forget()
    workdir = new_workdir(tmp_path_factory.getbasetemp(), tmp_path)
    with cluster.held("fit"):
        with cluster.held("trial"), cluster.held("select"):
            command = start(tmp_path, "run", tasks, "--workdir", workdir, "--address", cluster.address)
            cluster.remove_node_of(cluster.wait_for_new("select", 0, command))
            cluster.add_node()
            cluster.wait_for_new("select", 1, command)
            (cluster.notes / "hold-select").unlink()
            cluster.remove_node_of(cluster.wait_for_new("trial", 0, command))
            cluster.add_node()
            (cluster.notes / "hold-select").touch()
        cluster.remove_node_of(cluster.wait_for_new("fit", 0, command))
        cluster.add_node()
    answer = command.end()
    assert answer.code == 0, command.said()
    assert results(workdir) == expected
    begun = {kind: len(cluster.begun(kind)) for kind in ("select", "trial", "fit")}
    print(begun, answer.out)
