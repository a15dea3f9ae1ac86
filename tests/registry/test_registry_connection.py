"""Opening a registry: at once from many processes, after an interruption, and where there is
nothing to open.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from helpers_paths import PROJECT_ROOT

from pipeline.errors import RegistryError, RegistryRefused, RegistryUnreachable, StorageError
from pipeline.registry.connection import initialise_sqlite, resolve_tracking_uri
from pipeline.registry.failures import registry_errors
from pipeline.registry.store import Registry, open_registry

OPEN = """
import sys
from pathlib import Path
from pipeline.registry.store import open_registry
registry = open_registry(None, Path(sys.argv[1]))
print(registry.store.tracking_uri, registry.client.get_experiment_by_name("taskpack").experiment_id)
"""


def test_four_processes_may_open_a_fresh_folder_at_once(tmp_path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"
    }
    command = [sys.executable, "-c", OPEN, str(tmp_path / "fresh")]
    root = PROJECT_ROOT
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=root,
        )
        for _ in range(4)
    ]
    answers = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, answers
    assert len({out for out, _ in answers}) == 1, "one store, one experiment"
    assert {err for _, err in answers} == {""}, "no noise"
    with sqlite3.connect(tmp_path / "fresh" / "mlflow.db") as database:
        assert database.execute(
            "SELECT COUNT(*) FROM experiments WHERE name = 'taskpack'"
        ).fetchone() == (1,)
    database.close()
    assert not list((tmp_path / "fresh").glob("*.draft*"))


def test_a_store_whose_making_was_interrupted_is_made_again(tmp_path) -> None:
    database = tmp_path / "mlflow.db"
    (tmp_path / "mlflow.db.draft").write_bytes(b"SQLite format 3\0" * 300)
    (tmp_path / "mlflow.db.draft-journal").write_bytes(b"half")
    initialise_sqlite(database, tmp_path / "artifacts")
    assert {path.name for path in tmp_path.glob("*.db*")} <= {"mlflow.db", "mlflow.db.lock"}
    assert Registry(f"sqlite:///{database}", tmp_path / "artifacts").search() == []


@pytest.mark.parametrize(
    "uri", ["./mlruns", "file:///tmp/mlruns", "sqlite://", "sqlite:///:memory:", "/absolute/path"]
)
def test_a_uri_that_is_no_store_is_refused(tmp_path, uri) -> None:
    with pytest.raises(RegistryError, match=r"sqlite:////absolute/path/mlflow\.db"):
        open_registry(uri, tmp_path)


def test_the_tracking_uri_is_absolute_and_the_environment_comes_second(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_tracking_uri(None, Path("work")) == f"sqlite:///{tmp_path}/work/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///theirs.db")
    assert resolve_tracking_uri(None, Path("work")) == f"sqlite:///{tmp_path}/theirs.db"
    assert resolve_tracking_uri("http://server:5000", Path("work")) == "http://server:5000"


def test_a_file_that_is_no_database_is_named(tmp_path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(
        RegistryError, match=r"mlflow\.db: this file is not an intact SQLite database"
    ):
        open_registry(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="choose another folder"):
        open_registry(f"sqlite:///{tmp_path}/file/mlflow.db", tmp_path)


def test_a_server_that_is_not_there_is_reported_soon(tmp_path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    before, begin = dict(os.environ), time.monotonic()
    with pytest.raises(
        RegistryUnreachable,
        match=f"http://\\*\\*\\*@127.0.0.1:{port}: the MLflow server cannot be reached",
    ) as caught:
        open_registry(f"http://user:secret@127.0.0.1:{port}", tmp_path)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert time.monotonic() - begin < 15
    assert os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") == before.get(
        "MLFLOW_HTTP_REQUEST_TIMEOUT", "60"
    )


def test_a_server_that_never_answers_is_given_up_soon(tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with pytest.raises(RegistryError, match="cannot be reached"):
            open_registry(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
        assert time.monotonic() - begin < 15


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (404, RegistryError, "not as MLflow does"),
        (401, RegistryRefused, "MLFLOW_TRACKING_TOKEN"),
        (403, RegistryRefused, "READ, runs EDIT"),
        (429, RegistryUnreachable, "cannot answer now"),
        (503, RegistryUnreachable, "cannot answer now"),
    ],
)
def test_a_server_that_refuses_is_explained(tmp_path, status, kind, message) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(kind, match=message):
                open_registry(f"http://127.0.0.1:{server.server_port}", tmp_path)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            (
                "request to http://h/api/2.0/mlflow-artifacts/artifacts/1 failed:"
                " ResponseError('too many 500 error responses')"
            ),
            RegistryUnreachable,
            "its artifact store",
        ),
        (
            "(sqlite3.OperationalError) database is locked",
            RegistryUnreachable,
            "another process is writing",
        ),
        (
            "failed with error code 403 != 200. Response body: 'Invalid Host header'",
            RegistryRefused,
            "--allowed-hosts",
        ),
        (
            "INVALID_PARAMETER_VALUE: no such filter\n\nTraceback",
            RegistryError,
            "MLflow refused: INVALID_PARAMETER_VALUE: no such filter$",
        ),
        ("", RegistryError, "no reason given"),
    ],
)
def test_what_may_pass_is_told_from_what_does_not(text, kind, message) -> None:
    with pytest.raises(kind, match=message) as caught, registry_errors("http://h"):
        raise sqlite3.Error(text)
    assert type(caught.value) is kind


def test_no_secret_is_in_a_message() -> None:
    text = (
        "500 Server Error for url:"
        " http://me:hidden@h/x?X-Amz-Credential=hidden/1&X-Amz-Signature=hidden&a=1 or"
        " https://h/y?sig=hidden"
    )
    with pytest.raises(RegistryUnreachable) as caught, registry_errors("https://me:hidden@h:5000"):
        raise sqlite3.Error(text)
    assert "hidden" not in str(caught.value)
    assert "https://***@h:5000: " in str(caught.value)
    assert "http://***@h/x?***" in str(caught.value)
