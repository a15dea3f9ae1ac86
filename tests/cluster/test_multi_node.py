"""Several tasks on several nodes: the packs of a plain loop in one process, whatever is lost on the
way, and nothing finished done twice.
"""

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
from helpers_cli import (
    TASK,
    empty_registry,
    environment,
    free_port,
    new_workdir,
    taskpack_process,
    write_task,
)
from helpers_cluster import (
    Command,
    TestCluster,
    results,
    start,
    test_cluster,
    title,
    wait_until,
    written,
)
from helpers_paths import TESTS

from pipeline.adaptation.packing import SizePlanner
from pipeline.data import prepare
from pipeline.driver.workspace import Workspace
from pipeline.search.champion import choose_champion
from pipeline.search.proposer import make_proposer
from pipeline.search.study import Study
from pipeline.search.trial import run_trial
from pipeline.search.trial_record import TrialJournal
from pipeline.selection import read_selection, select_locally, write_selection
from pipeline.specs import Task
from pipeline.specs.task_files import load_tasks
from pipeline.training import open_inputs
from pipeline.training.fit import fit

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TRAINING = {"epochs": 3, "batch_size": 16, "precision": "fp32"}
OBJECT_STORE_BYTES = 80 << 20  # the least that Ray allows is 75 MiB
TRIALS = 6  # four of bars, two of shapes


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classification that trains connections, and a segmentation."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(
        folder,
        name="bars",
        recipe={**TASK["recipe"], "training": TRAINING},
        search={"bits": [4, 8], "top_k": [1, 2]},
    )
    linear = {"connections": None, "training": TRAINING}
    write_task(
        folder,
        name="shapes",
        kind="segmentation",
        data={**TASK["data"], "kind": "shapes"},
        recipe=linear,
        search={"head_bits": [4, 8]},
    )
    return folder


def run_plainly(task: Task, workspace: Workspace) -> None:
    """A task from data to pack in this process, one thing after another."""
    prepare(task, data := workspace.data(task.name))
    inputs = open_inputs(task, data)
    task = inputs.task
    top_k = task.search.max_top_k(task.recipe)
    folder, selected = workspace.study(inputs, top_k), None
    if top_k:
        write_selection(select_locally(inputs, top_k), path := workspace.selection(inputs, top_k))
        selected = read_selection(path)
    planner = SizePlanner(task, inputs.backbone, inputs.index.classes, selected)
    journal = TrialJournal(folder.root / "trials")
    study = Study(task, make_proposer(task, planner.size_bytes), journal)
    while (number := study.next_trial()) is not None:
        recipe, kept = study.proposals[number].recipe, study.kept(number)
        for epoch, (score, _) in enumerate(run_trial(inputs, recipe, selected, kept=kept), start=1):
            if not study.report(number, epoch, score.value, score.standard_error):
                break
        study.finish(number, 0.0, None)
    champion = choose_champion(study.all_records(), task, journal.outcomes)[0]
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


@pytest.mark.parametrize(
    "stage",
    [
        "trial",
        pytest.param("select", marks=pytest.mark.slow),
        pytest.param("fit", marks=pytest.mark.slow),
    ],
)
def test_a_node_that_is_lost_changes_nothing(
    stage: str,
    cluster: TestCluster,
    tasks: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A node dies without warning while a worker of each stage is at work on it, beside another
    task's.
    """
    cluster.forget()
    workdir = new_workdir(tmp_path_factory.getbasetemp(), tmp_path)
    options = ("--address", cluster.address, "--selection-workers", "1", "--json")
    with cluster.held(stage):
        command = start(tmp_path, "run", tasks, "--workdir", workdir, *options)
        cluster.lose_node_of(cluster.wait_for(stage, 1, command))
    answer = command.end()
    assert answer.code == 0, command.said()
    assert [(task["task"], task["stage"]) for task in answer.json()] == [
        ("bars", "done"),
        ("shapes", "done"),
    ]
    assert results(workdir) == expected
    undisturbed = {"select": 1, "trial": TRIALS, "fit": 2}
    assert cluster.counts() == {**undisturbed, stage: undisturbed[stage] + 1}, (
        "what was lost is done again, and nothing else"
    )


@pytest.mark.slow
def test_nodes_that_are_lost_change_nothing_of_what_two_ranks_train(
    cluster: TestCluster, tiny_data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One rank a node. In the fit, the node of the first rank dies, in another run that of the
    other.
    """
    shards = {split: str(tiny_data / f"{split}-*.tar") for split in ("train", "test")}
    recipe = {"connections": None, "training": TRAINING}
    task = write_task(
        tmp_path / "tasks",
        name="bars",
        data={"format": "shards", **shards},
        recipe=recipe,
        search={"head_bits": [4, 8]},
    )

    def run(name: str) -> tuple[Command, Path]:
        cluster.forget()
        workdir = new_workdir(tmp_path_factory.getbasetemp(), tmp_path / name)
        return start(
            tmp_path / name,
            "run",
            task,
            "--workdir",
            workdir,
            "--address",
            cluster.address,
            "--ranks-per-trial",
            "2",
        ), workdir

    command, undisturbed = run("undisturbed")
    assert command.end().code == 0, command.said()
    assert cluster.counts() == {"select": 0, "trial": 4, "fit": 2}, (
        "what a trial or a fit does, both ranks begin"
    )
    for rank in ("fit_worker", "_other"):
        with cluster.held("fit"):
            command, workdir = run(f"without {rank}")
            cluster.wait_for("fit", 2, command)
            (process,) = [
                process for process in cluster.begun("fit") if title(process) == f"ray::{rank}"
            ]
            cluster.lose_node_of(process)
        assert command.end().code == 0, command.said()
        assert cluster.counts() == {"select": 0, "trial": 4, "fit": 4}, rank
        assert results(workdir) == results(undisturbed)


@pytest.mark.slow
def test_a_head_that_is_lost_ends_the_run_and_another_cluster_goes_on(
    tasks: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """All trials of one task are finished when the head dies, in the selection of the other."""
    workdir = new_workdir(tmp_path_factory.getbasetemp(), tmp_path)

    def run(cluster: TestCluster) -> Command:
        return start(
            tmp_path / cluster.notes.name,
            "run",
            tasks,
            "--workdir",
            workdir,
            "--address",
            cluster.address,
            "--selection-workers",
            "1",
        )

    with (
        test_cluster(tmp_path / "first", nodes=2) as cluster,
        cluster.held("select"),
        cluster.held("fit"),
    ):
        command = run(cluster)
        cluster.wait_for("select", 1, command)
        cluster.wait_for("fit", 1, command)
        cluster.lose_head()
        answer = command.end()
    assert answer.code == 7, command.said()
    assert (
        "has not answered for 50 seconds; when the cluster is up again, run the same command"
        in command.said().replace("\n", " ")
    )
    finished = written(workdir)

    with test_cluster(tmp_path / "second", nodes=2) as cluster:
        command = run(cluster)
        assert command.end().code == 0, command.said()
        assert cluster.counts() == {"select": 1, "trial": TRIALS - 2, "fit": 2}, (
            "the trials of shapes were not run again"
        )
    assert {
        path: time for path, time in written(workdir).items() if path in finished
    } == finished, "what was finished was written again"
    assert results(workdir) == expected


@pytest.mark.slow
def test_a_full_object_store_changes_nothing(
    tasks: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Others have filled the nodes' object stores thrice over: what taskpack puts there pushes out
    what lies there, and may be pushed out itself.
    """
    workdir = new_workdir(tmp_path_factory.getbasetemp(), tmp_path)
    with (
        test_cluster(
            tmp_path / "notes", nodes=2, object_store_memory=OBJECT_STORE_BYTES
        ) as cluster,
        other_objects(cluster, 3 * OBJECT_STORE_BYTES),
    ):
        command = start(
            tmp_path,
            "run",
            tasks,
            "--workdir",
            workdir,
            "--address",
            cluster.address,
            "--selection-workers",
            "1",
        )
        assert command.end().code == 0, command.said()
        assert cluster.counts() == {"select": 1, "trial": TRIALS, "fit": 2}
    assert results(workdir) == expected


@contextlib.contextmanager
def other_objects(cluster: TestCluster, total_bytes: int) -> Iterator[None]:
    """Another user of the cluster holds so many bytes of objects on every node meanwhile."""
    with subprocess.Popen(
        [
            sys.executable,
            str(TESTS / "helpers_objects.py"),
            cluster.address,
            str(total_bytes),
        ],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield
        other.communicate("end\n")
    assert other.returncode == 0, "the other user's objects came back as they were"


class MlflowServer:
    """A tracking server on a copy of an empty store, which can be killed and started again at the
    same address.
    """

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
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            store,
            "--artifacts-destination",
            str(artifacts),
            *options,
        ]
        with (self.folder / "log").open("a") as log:
            changes = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self.process = subprocess.Popen(
                command, env=environment(**changes), stdout=log, stderr=log, start_new_session=True
            )
        assert wait_until(self._answers), (self.folder / "log").read_text()

    def _answers(self) -> bool:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer,
        ):
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


def is_over(command: Command) -> bool:
    return command.process.poll() is not None


def check_kept(finished: dict[Path, int], workdir: Path) -> None:
    """Nothing finished was written again; what was finished since is added to `finished`."""
    now = written(workdir)
    assert {path: now.get(path) for path in finished} == finished
    finished.update(now)


@pytest.mark.slow
def test_a_killed_driver_and_a_registry_that_goes_and_comes_back(
    cluster: TestCluster,
    server: MlflowServer,
    tasks: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """The driver is killed in the search and in the fit; in the last run, the server goes away
    before the first pack is registered.
    """
    cluster.forget()
    workdir = tmp_path / "work"
    finished: dict[Path, int] = {}

    def run(name: str) -> Command:
        given = ("run", tasks, "--workdir", workdir, "--address", cluster.address)
        return start(tmp_path / name, *given, MLFLOW_TRACKING_URI=server.address)

    command = run("killed in search")
    assert wait_until(lambda: any(workdir.glob("studies/*/trials/*.json")) or is_over(command))
    command.kill()
    finished |= written(workdir)

    with cluster.held("fit"):
        command = run("killed in fit")
        cluster.wait_for("fit", 2, command)
        command.kill()
    check_kept(finished, workdir)
    trials, selections = len(cluster.begun("trial")), len(cluster.begun("select"))
    assert TRIALS <= trials <= TRIALS + 2, "no more was done twice than what two nodes were at"
    assert selections <= 2, "the one selection was made again at most where it was cut off"

    with cluster.held("fit"):
        command = run("while the registry is away")
        cluster.wait_for("fit", 4, command)
        server.kill()
    assert wait_until(lambda: "register - waiting: " in command.out.read_text() or is_over(command))
    server.start()
    answer = command.end()
    assert answer.code == 0, command.said()
    check_kept(finished, workdir)
    assert cluster.counts() == {"select": selections, "trial": trials, "fit": 4}, (
        "the last run searched nothing and did the two lost fits again"
    )
    assert results(workdir) == expected
    packs = taskpack_process("ls", "--json", MLFLOW_TRACKING_URI=server.address).json()
    assert sorted((pack["name"], pack["version"]) for pack in packs) == [("bars", 1), ("shapes", 1)]
