"""What a submitted batch is, how its attempts follow each other, and how a cluster that refuses is
reported; no cluster here.
"""

from __future__ import annotations

import http.server
import json
import os
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from helpers_cases import for_every
from helpers_cli import TASK, taskpack, write_task
from helpers_paths import PROJECT_ROOT

from pipeline.driver import jobs
from pipeline.driver.jobs import Batch, JobServer, describe
from pipeline.driver.monitor.state import BATCH_VARIABLE, BatchState, TaskState
from pipeline.errors import ClusterError, SpecError
from pipeline.specs.paths import DATA_ROOT, local_paths
from pipeline.specs.task_files import load_tasks

CATALOGUE = PROJECT_ROOT / "tasks"


@dataclass
class FakeClient:
    """A jobs server in memory, as Ray's client shows it."""

    jobs: list[SimpleNamespace] = field(default_factory=list)
    faster: bool = False  # somebody else submits the same job just before
    refusals: int = 0  # before the agent of a head that has just started is up

    def list_jobs(self) -> list[SimpleNamespace]:
        foreign = SimpleNamespace(
            metadata=None,
            status="RUNNING",
            submission_id=None,
            message=None,
            start_time=1,
            end_time=None,
            driver_node_id=None,
        )
        return [foreign, *self.jobs]

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str,
        runtime_env: dict[str, Any],
        metadata: dict[str, str],
    ) -> None:
        if self.refusals:
            self.refusals -= 1
            raise RuntimeError(
                "Request failed with status code 500: No available agent to submit job, please try"
                " again later.."
            )
        if self.faster:
            self.faster = False
            self.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env=runtime_env,
                metadata=metadata,
            )
        if submission_id in [job.submission_id for job in self.jobs]:
            raise RuntimeError(
                "Request failed with status code 500: Traceback:\n ...\nRuntimeError:"
                f" {submission_id} already exists"
            )
        sent = {
            path.name: path.read_text()
            for path in Path(runtime_env["working_dir"], "tasks").iterdir()
        }
        times = {
            "start_time": 1000 * len(self.jobs) + 1000,
            "end_time": None,
            "driver_node_id": None,
        }
        job = {
            "submission_id": submission_id,
            "status": "PENDING",
            "message": "queued",
            "metadata": metadata,
            "entrypoint": entrypoint,
        }
        self.jobs.append(SimpleNamespace(**job, **times, sent=sent, runtime_env=runtime_env))

    def stop_job(self, job: str) -> bool:
        next(known for known in self.jobs if known.submission_id == job).status = "STOPPED"
        return True

    def get_job_logs(self, job: str) -> str:
        return f"log of {job}\n"

    async def tail_job_logs(self, job: str) -> Any:
        yield "one\n"
        self.jobs[-1].status = "SUCCEEDED"
        yield "two\n"


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def server(client: FakeClient) -> JobServer:
    return JobServer("http://head:8265/", client)


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return describe(load_tasks([write_task(tmp_path)], expand=False), workdir="/mnt/runs")


# --- the description ------------------------------------------------------------------------------


def test_a_description_is_read_as_the_tasks_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every task of the catalogue, bases and shared sections and all, alone in a folder of another
    machine with its own datasets.
    """
    folders = [CATALOGUE / name for name in ("demo", "fewshot", "fgvc", "large", "vtab1k")]
    monkeypatch.delenv(DATA_ROOT, raising=False)
    sent = describe(load_tasks(folders, expand=False), workdir="/mnt/runs", shared=[CATALOGUE])
    for name, text in sent.files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv(DATA_ROOT, "/mnt/data")
    there = load_tasks([tmp_path])
    assert len(there) == len(sent.files) > 30
    assert sorted(there, key=lambda task: task.name) == sorted(
        load_tasks(folders), key=lambda task: task.name
    )


def test_the_machine_that_reads_a_description_says_where_the_data_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_ROOT, "/only/here")
    data = {"format": "lists", "root": "$TASKPACK_DATA/x", "classes": 2}
    sent = describe(
        load_tasks([write_task(tmp_path, data=data)], expand=False), workdir="/mnt/runs"
    )
    assert yaml.safe_load(sent.files["bars.yaml"])["data"]["root"] == "$TASKPACK_DATA/x"


@for_every(
    ("changes", "key"),
    [
        ({"data": {"format": "folder", "train": "a", "test": "https://host/b"}}, "data.train"),
        (
            {
                "data": {
                    "train": ["$TASKPACK_DATA/a.tar", "s3://b/c.tar"],
                    "test": ["$TASKPACK_DATA/d.tar", "e.tar"],
                }
            },
            "data.test",
        ),
        (
            {"data": {"format": "lists", "root": "$TASKPACK_DATA/a", "classes": "names.txt"}},
            "data.classes",
        ),
        (
            {"backbone": {"model": "vit_tiny_patch16_224", "weights": "own.safetensors"}},
            "backbone.weights",
        ),
    ],
)
def test_what_the_cluster_may_not_have_is_refused(
    changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    tasks = load_tasks([write_task(tmp_path, **changes)], expand=False)
    with pytest.raises(
        SpecError, match=f"task bars: {key}: {tmp_path}/.* is a path of this machine.*--shared"
    ):
        describe(tasks, workdir="/mnt/runs")
    assert describe(tasks, workdir="/mnt/runs", shared=[tmp_path]).files
    assert [found for found, _ in local_paths(tasks[0])] == [key]


def test_a_work_folder_of_the_cluster_is_absolute(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--workdir: given 'runs'; expected an absolute path"):
        describe(load_tasks([write_task(tmp_path)]), workdir="runs")


def test_the_id_is_of_the_description_not_of_the_order(tmp_path: Path) -> None:
    tasks = load_tasks([write_task(tmp_path), write_task(tmp_path, name="other")])
    one = describe(tasks, workdir="/mnt/runs")
    assert describe(tasks[::-1], workdir="/mnt/runs").default_id == one.default_id
    others = [
        describe(tasks[:1], workdir="/mnt/runs"),
        describe(tasks, workdir="/mnt/other"),
        describe(tasks, workdir="/mnt/runs", options=["--gpus-per-trial", "1"]),
        describe([tasks[0], tasks[1].model_copy(update={"seed": 1})], workdir="/mnt/runs"),
    ]
    assert len({batch.default_id for batch in [one, *others]}) == 5


# --- attempts -------------------------------------------------------------------------------------


def test_a_batch_that_runs_or_is_done_is_not_started_again(
    server: JobServer, client: FakeClient, batch: Batch
) -> None:
    first, started = server.submit(batch)
    assert (first.batch, first.attempt, first.tasks, started) == (batch.default_id, 1, 1, True)
    for state in ("PENDING", "RUNNING", "SUCCEEDED"):
        client.jobs[0].status = state
        again, started = server.submit(batch)
        assert (again.job, started) == (first.job, False)
    assert len(client.jobs) == 1


@pytest.mark.parametrize("state", ["FAILED", "STOPPED"])
def test_a_batch_that_ended_early_gets_a_new_attempt(
    state: str, server: JobServer, client: FakeClient, batch: Batch
) -> None:
    server.submit(batch, "friday")
    client.jobs[0].status = state
    attempt, started = server.submit(batch, "friday")
    assert (attempt.batch, attempt.attempt, attempt.job, started) == ("friday", 2, "friday.2", True)
    assert [(known.attempt, known.state) for known in server.attempts()] == [
        (2, "PENDING"),
        (1, state),
    ]
    assert server.find("friday").attempt == 2


def test_of_two_who_submit_at_once_one_starts_it(
    server: JobServer, client: FakeClient, batch: Batch
) -> None:
    client.faster = True
    attempt, started = server.submit(batch)
    assert (attempt.attempt, started, len(client.jobs)) == (1, False, 1)


def test_a_head_that_has_just_started_is_waited_for(
    server: JobServer, client: FakeClient, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0)
    client.refusals = 2
    assert server.submit(batch, "new")[1]
    assert len(client.jobs) == 1
    monkeypatch.setattr(jobs, "_AGENT_SECONDS", -1)
    client.refusals = 1
    with pytest.raises(ClusterError, match="No available agent"):
        server.submit(batch, "newer")


def test_an_id_belongs_to_one_description_while_it_runs(
    server: JobServer, client: FakeClient, batch: Batch
) -> None:
    server.submit(batch, "friday")
    other = Batch(batch.files, ("--workdir", "/mnt/other"))
    with pytest.raises(
        SpecError, match="'friday', but other tasks or options with this id are running"
    ):
        server.submit(other, "friday")
    client.jobs[0].status = "FAILED"
    assert server.submit(other, "friday")[1]


@for_every("batch_id", ["", "a b", "a/b", ".a", "-a", "x" * 64, "a\n"])
def test_an_id_that_is_none_is_refused(batch_id: str, server: JobServer, batch: Batch) -> None:
    with pytest.raises(SpecError, match="--batch-id"):
        server.submit(batch, batch_id)


def test_the_job_is_the_command_and_the_description(
    server: JobServer, client: FakeClient, batch: Batch, tmp_path: Path
) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "cli.py").touch()
    quoted = Batch(batch.files, ("--workdir", "/mnt/it's a; folder"))
    server.submit(quoted, working_dir=tmp_path, python="/opt/my venv/bin/python")
    (job,) = client.jobs
    words = [
        "/opt/my venv/bin/python",
        "-m",
        "pipeline.cli.app",
        "run",
        "tasks",
        "--address",
        "auto",
        "--workdir",
        "/mnt/it's a; folder",
    ]
    assert shlex.split(job.entrypoint) == words
    assert job.sent == batch.files
    assert job.runtime_env["py_modules"] == [str(tmp_path / "pipeline")]
    assert job.runtime_env["env_vars"] == {BATCH_VARIABLE: job.submission_id}
    assert not Path(job.runtime_env["working_dir"]).exists()
    with pytest.raises(SpecError, match="--working-dir"):
        server.submit(batch, working_dir=tmp_path / "pipeline")


def test_logs_and_stop_are_of_the_last_attempt(
    server: JobServer, client: FakeClient, batch: Batch
) -> None:
    server.submit(batch, "friday")
    assert server.logs("friday") == "log of friday.1\n"
    stopped, was_running = server.stop("friday")
    assert (stopped.state, was_running) == ("STOPPED", True)
    assert server.stop("friday")[1] is False
    server.submit(batch, "friday")
    written: list[str] = []
    assert server.follow("friday", written.append).state == "SUCCEEDED"
    assert written == ["one\n", "two\n"]


def test_where_tasks_stand_is_asked_of_the_node_that_knows(
    client: FakeClient, batch: Batch
) -> None:
    asked: list[tuple[str, dict[str, list[str]]]] = []
    state = BatchState(
        batch="friday.1",
        started=1.0,
        written=2.0,
        is_over=False,
        seconds_left=None,
        tasks=(TaskState(task="bars"),),
    )
    answers = [
        (200, json.dumps(state.as_json())),
        (500, "A file is not found"),
        (200, "not JSON"),
        (200, "{}"),
    ]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.headers["Authorization"], parse_qs(urlsplit(self.path).query)))
            status, text = answers[len(asked) - 1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as cluster:
        threading.Thread(target=cluster.serve_forever, daemon=True).start()
        server = JobServer(f"http://127.0.0.1:{cluster.server_port}", client)
        attempt, _ = server.submit(batch, "friday")
        assert server.progress(attempt) is None
        assert asked == []  # its driver runs nowhere yet
        client.jobs[0].driver_node_id = "node"
        attempt = server.find("friday")
        assert [server.progress(attempt) for _ in answers] == [state, None, None, None]
        cluster.shutdown()
    wanted = {"node_id": ["node"], "filename": ["taskpack-friday.1.json"], "lines": ["-1"]}
    assert asked == [(f"Bearer {os.environ['RAY_AUTH_TOKEN']}", wanted)] * 4
    with pytest.raises(ClusterError, match="no jobs server answers"):
        server.progress(attempt)


def test_a_batch_that_is_not_there(server: JobServer, batch: Batch) -> None:
    with pytest.raises(
        ClusterError,
        match=(
            r"friday: the cluster at http://head:8265 has no such batch\. A cluster that was"
            r" restarted"
        ),
    ):
        server.find("friday")
    server.submit(batch, "monday")
    with pytest.raises(ClusterError, match="it has monday"):
        server.stop("friday")


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture
def answering(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that gives every request one and the same status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()
            self.wfile.write(b"no")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("answering", "message"),
    [
        (401, "asks for a token, and none was sent"),
        (403, "the token is not this cluster's"),
        (404, "refused"),
        (500, "refused"),
        (200, "refused"),
    ],
    indirect=["answering"],
)
def test_a_server_that_refuses_is_one_message(
    answering: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")  # the address given counts
    answer = taskpack("status", "--address", answering)
    assert (answer.code, answer.out) == (7, "")
    assert answer.err.startswith(f"error: {answering}: ")
    assert message in answer.err
    assert len(answer.err) < 500


@for_every("address", ["auto", "head:8265", "ray://head:10001", "http://", "ftp://head"])
def test_an_address_that_is_none(address: str) -> None:
    answer = taskpack("logs", "friday", "--address", address)
    assert answer.code == 7
    assert f"given '{address}'" in answer.words or f"given '{address.rstrip('/')}'" in answer.words


def test_nobody_answers() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as unused:
        address = f"http://127.0.0.1:{unused.server_port}"
    answer = taskpack("stop", "friday", "--address", address)
    assert answer.code == 7
    assert f"no jobs server answers at {address}" in answer.words


def test_faults_of_tasks_show_before_the_cluster_is_asked(tmp_path: Path) -> None:
    answer = taskpack(
        "submit",
        write_task(tmp_path, data={**TASK["data"], "kind": "stars"}),
        "--workdir",
        "/mnt/runs",
        "--address",
        "http://nowhere.invalid:1",
    )
    assert answer.code == 2
    assert "data.kind" in answer.err


def test_the_token_is_found_where_ray_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert jobs._token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("own\n")
    assert jobs._token() == "own"
    (tmp_path / "file").write_text("file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert jobs._token() == "file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
    assert jobs._token() == "variable"
