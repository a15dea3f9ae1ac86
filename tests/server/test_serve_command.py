"""`taskpack serve`, as a user starts it, on a Ray of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers_cli import COMMAND, environment, free_port, taskpack, taskpack_process
from helpers_server import TOKEN, Shop, ask, half_sent, png, wait_until

from pipeline.errors import ServerError
from pipeline.server.client import Client

pytest.importorskip("grpc_reflection", reason="the extra serving (ray[serve]) is not installed")


def test_serve_answers_from_a_replica_and_ends_in_order(shop: Shop, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(COMMAND), "serve", "birds", "--port", str(port), "--workdir", str(tmp_path)]
    registry = f"sqlite:///{shop.workdir}/mlflow.db"
    process = subprocess.Popen(
        [*command, "--registry", registry, "--cpus", "0.5", "--device", "cpu"],
        env=environment(TASKPACK_TOKEN=TOKEN),
        stdout=subprocess.PIPE,
        stderr=(log := open(tmp_path / "stderr", "w+")),  # noqa: SIM115 - closed below
        text=True,
        start_new_session=True,
    )

    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first == f"serving at {url}; Ctrl-C ends it\n", (tmp_path / "stderr").read_text()
        assert ask(f"{url}/readyz", token=None)[0] == 200
        client, image = Client(url, TOKEN), png()
        rows = client.predict(list(shop.packs), [image])
        assert [row["task"] for row in rows] == list(shop.packs)
        assert all(row["label"] in shop.packs[row["task"]].metadata.classes for row in rows)
        assert ask(f"{url}/v1/tasks", token="guess")[0] == 401
        connection, rest = half_sent(port, image)
        with connection:
            time.sleep(1)  # the replica has it
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: ask(f"{url}/readyz", token=None)[0] != 200)
            assert ask(f"{url}/readyz", token=None)[0] == 503
            with pytest.raises(ServerError, match=r"starts or ends; send the request again \(503"):
                client.predict("birds", [image])
            connection.sendall(rest)
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert b'"label"' in answer
        assert process.communicate(timeout=90)[0] == ""
        said = (tmp_path / "stderr").read_text()
        assert said.endswith("terminated; run the same command to start again\n")
    finally:
        log.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_registry_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    run = taskpack("serve", "--registry", "mlflow.db", "--workdir", tmp_path)
    assert run.code == 8
    assert "mlflow.db: not a tracking URI" in run.err


def test_what_keeps_a_server_from_starting_is_said(shop: Shop, tmp_path: Path) -> None:
    registry = f"sqlite:///{shop.workdir}/mlflow.db"
    given = ("serve", "--registry", registry, "--workdir", tmp_path)
    run = taskpack(*given, "nobody")
    assert (run.code, run.err) == (
        8,
        "error: nobody: no task of this name is registered; `taskpack ls` lists what there is\n",
    )
    missing = tmp_path / "missing.safetensors"
    run = taskpack_process(*given, "birds", "--port", str(free_port()), "--backbone", missing)
    assert (run.code, run.out) == (13, "")
    start = f"error: the server does not start: backbone.weights: given '{missing}', no such file"
    assert run.err.startswith(start)
    assert "Traceback" not in run.err
