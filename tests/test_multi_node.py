"""Several tasks on several nodes: the packs of a plain loop in one process, whatever is lost on the way, and nothing finished done twice."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_cli import TASK, empty_registry, environment, free_port, new_workdir, taskpack_process, write_task
from helpers_cluster import Command, TestCluster, results, start, test_cluster, wait_until, written

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


@pytest.mark.parametrize("stage", ["trial", pytest.param("select", marks=pytest.mark.slow), pytest.param("fit", marks=pytest.mark.slow)])
def test_a_node_that_is_lost_changes_nothing(
    stage: str, cluster: TestCluster, tasks: Path, expected: dict[str, bytes], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A node dies without warning while a worker of each stage is at work on it, beside another task's."""
    cluster.forget()
    workdir = new_workdir(tmp_path_factory.getbasetemp(), tmp_path)
    options = ("--address", cluster.address, "--selection-workers", "1", "--json")
    with cluster.held(stage):
        command = start(tmp_path, "run", tasks, "--workdir", workdir, *options)
        cluster.lose_node_of(cluster.wait_for(stage, 1, command))
    answer = command.end()
    assert answer.code == 0, command.said()
    assert [(task["task"], task["stage"]) for task in answer.json()] == [("bars", "done"), ("dots", "done")]
    assert results(workdir) == expected
    undisturbed = {"select": 1, "trial": TRIALS, "fit": 2}
    assert cluster.counts() == {**undisturbed, stage: undisturbed[stage] + 1}, "what was lost is done again, and nothing else"


class MlflowServer:
    """A tracking server on a copy of an empty store, which can be killed and started again at the same address."""

    def __init__(self, base: Path, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        shutil.copyfile(empty_registry(base), folder / "server.db")
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store, artifacts = f"sqlite:///{self.folder / 'server.db'}", self.folder / "artifacts"
        options = ("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--artifacts-destination", str(artifacts), *options]
        with (self.folder / "log").open("a") as log:
            changes = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self.process = subprocess.Popen(command, env=environment(**changes), stdout=log, stderr=log, start_new_session=True)
        assert wait_until(self._answers), (self.folder / "log").read_text()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
        return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.getbasetemp(), tmp_path / "server")
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_killed_driver_and_a_registry_that_goes_and_comes_back(
    cluster: TestCluster, server: MlflowServer, tasks: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The driver is killed in the search and in the fit; in the last run, the server goes away before the first pack is registered."""
    cluster.forget()
    workdir = tmp_path / "work"
    finished: dict[Path, int] = {}

    def run(name: str) -> Command:
        given = ("run", tasks, "--workdir", workdir, "--address", cluster.address)
        return start(tmp_path / name, *given, MLFLOW_TRACKING_URI=server.address)

    def check_kept() -> None:
        now = written(workdir)
        assert {path: now.get(path) for path in finished} == finished, "what was finished was written again"
        finished.update(now)

    command = run("killed in search")
    assert wait_until(lambda: any(workdir.glob("studies/*/trials/*.json")) or command.process.poll() is not None)
    command.kill()
    finished |= written(workdir)

    with cluster.held("fit"):
        command = run("killed in fit")
        cluster.wait_for("fit", 2, command)
        command.kill()
    check_kept()
    trials, selections = len(cluster.begun("trial")), len(cluster.begun("select"))
    assert TRIALS <= trials <= TRIALS + 2, "no more was done twice than what two nodes were at"
    assert selections <= 2, "the one selection was made again at most where it was cut off"

    with cluster.held("fit"):
        command = run("while the registry is away")
        cluster.wait_for("fit", 4, command)
        server.kill()
    assert wait_until(lambda: "register - waiting: " in command.out.read_text() or command.process.poll() is not None)
    server.start()
    answer = command.end()
    assert answer.code == 0, command.said()
    check_kept()
    assert cluster.counts() == {"select": selections, "trial": trials, "fit": 4}, "the last run searched nothing and did the two lost fits again"
    assert results(workdir) == expected
    packs = taskpack_process("ls", "--json", MLFLOW_TRACKING_URI=server.address).json()
    assert sorted((pack["name"], pack["version"]) for pack in packs) == [("bars", 1), ("dots", 1)]
