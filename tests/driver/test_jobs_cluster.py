"""Submission against a real Ray head with a token, started here on the loopback interface and ended
with the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests
from helpers_cli import (
    TASK,
    Answer,
    environment,
    free_port,
    new_workdir,
    taskpack,
    taskpack_process,
    write_task,
)

pytestmark = [
    pytest.mark.skipif(
        find_spec("aiohttp_cors") is None, reason="a head that takes jobs needs ray[default]"
    ),
    pytest.mark.filterwarnings(
        "ignore:ssl=None is deprecated:DeprecationWarning"
    ),  # Ray's client, of aiohttp
]

START_SECONDS = 90
STUB = """import os, sys, time
print("given", sys.argv[1:], sorted(os.listdir("tasks")), flush=True)
if os.path.exists("{folder}/wait"):
    time.sleep(600)
sys.exit(3 if os.path.exists("{folder}/fail") else 0)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The jobs server's address of a head with two CPUs, which takes the token that this process
    has.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets lie in it
    address = f"http://127.0.0.1:{(port := str(free_port()))}"
    options = {
        "--node-ip-address": "127.0.0.1",
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": port,
        "--temp-dir": folder,
        "--num-cpus": "2",
    }
    options |= {
        f"--{name}": str(free_port())
        for name in (
            "port",
            "dashboard-agent-listen-port",
            "metrics-export-port",
            "ray-client-server-port",
        )
    }
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--object-store-memory",
        "100000000",
    ]
    command += [word for option in options.items() for word in option]
    with Path(folder, "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for_jobs_server(address, process, Path(folder, "head.log"))
        yield address
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_jobs_server(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{address}/api/jobs/", headers=token, timeout=5).ok:
                return
        time.sleep(0.5)
    pytest.fail(f"the head did not start: {log.read_text()[-2000:]}")


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder whose package `pipeline` prints what it is given, and waits or fails while a file of
    that name is there.
    """
    folder = tmp_path / "clone"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "__init__.py").touch()
    (folder / "pipeline" / "cli.py").write_text(STUB.format(folder=tmp_path))
    return folder


def submit(head: str, task_file: Path, *options: str | Path) -> Answer:
    return taskpack("submit", task_file, "--address", head, "--python", sys.executable, *options)


def state(head: str, batch: str) -> list[tuple[int, str]]:
    return [
        (row["attempt"], row["state"])
        for row in json.loads(taskpack("status", batch, "--address", head, "--json").out)
    ]


def test_a_batch_that_fails_is_stopped_and_succeeds(head: str, stub: Path, tmp_path: Path) -> None:
    """The whole life of one batch: each attempt a job of its own, and no attempt beside a running
    or finished one.
    """
    options = ("--batch-id", "friday", "--working-dir", stub, "--workdir", "/mnt/a b")
    (tmp_path / "fail").touch()
    task_file = write_task(tmp_path / "tasks")
    assert "friday: 1 task submitted, attempt 1" in submit(head, task_file, *options).words
    followed = taskpack("logs", "friday", "--follow", "--address", head)
    assert followed.code == 7
    assert (
        "['run', 'tasks', '--address', 'auto', '--workdir', '/mnt/a b'] ['bars.yaml']"
        in followed.out
    )
    assert "friday: failed." in followed.err

    (tmp_path / "fail").unlink()
    (tmp_path / "wait").touch()
    assert "attempt 2" in submit(head, task_file, *options).words
    assert "is already running, nothing was started" in submit(head, task_file, *options).words
    deadline = time.monotonic() + 60
    while (
        "given" not in taskpack("logs", "friday", "--address", head).out
        and time.monotonic() < deadline
    ):
        time.sleep(0.5)
    assert "friday: stopped (STOPPED)" in taskpack("stop", "friday", "--address", head).words
    assert "was not running" in taskpack("stop", "friday", "--address", head).words

    (tmp_path / "wait").unlink()
    assert "attempt 3" in submit(head, task_file, *options).words
    assert taskpack("logs", "friday", "--follow", "--address", head).code == 0
    assert "is already done, nothing was started" in submit(head, task_file, *options).words
    assert state(head, "friday") == [(3, "SUCCEEDED"), (2, "STOPPED"), (1, "FAILED")]
    assert "friday  succeeded        3      1" in taskpack("status", "--address", head).out
    assert (
        taskpack("status", "friday", "--address", head, "--json").json()[0]["progress"] is None
    )  # the stub writes no state


def test_the_token_is_asked_for(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In processes of their own: Ray keeps the first token that a process has used.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 10)
    answers = [
        taskpack_process(
            "submit", write_task(tmp_path), "--workdir", "/mnt/runs", "--address", head
        )
    ]
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    answers += [taskpack_process("status", "--address", head)]
    assert [answer.code for answer in answers] == [7, 7]
    assert "(403); set RAY_AUTH_TOKEN" in answers[0].words
    assert "(401); set RAY_AUTH_TOKEN" in answers[1].words


def test_a_batch_runs_on_the_cluster_to_a_registered_pack(
    head: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    workdir = new_workdir(tmp_path_factory.getbasetemp(), tmp_path)
    recipe = {"connections": None, "training": {**TASK["recipe"]["training"], "epochs": 2}}
    task_file = write_task(tmp_path / "tasks", recipe=recipe, search={"head_bits": 8})
    assert (
        submit(
            head,
            task_file,
            "--workdir",
            workdir,
            "--batch-id",
            "real",
            "--cpus-per-trial",
            "0.5",
        ).code
        == 0
    )
    followed = taskpack("logs", "real", "--follow", "--address", head)
    assert followed.code == 0, followed.out
    stages = re.findall(r" s\] bars: (\w+)$", followed.out, re.MULTILINE)
    assert stages == ["prepare", "search", "fit", "register", "done"]
    (pack,) = taskpack("ls", "--workdir", workdir, "--json").json()
    assert pack["task"] == "bars"

    (told,) = taskpack("status", "real", "--address", head, "--json").json()
    (task,) = told["progress"]["tasks"]
    assert (told["progress"]["batch"], task["task"], task["stage"], task["size_bytes"]) == (
        "real.1",
        "bars",
        "done",
        pack["size_bytes"],
    )
    shown = taskpack("status", "real", "--address", head).out.splitlines()
    assert shown[-1] == "real.1: 1 task, 1 done; the run is over"
