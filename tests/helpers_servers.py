"""A tracking server as a team has it: MLflow with users, its tables in PostgreSQL, its files in an
S3 store; all three real, on this machine alone.

PostgreSQL comes from the system, not from a Python package, and does not run as root: its data
folder belongs to the system's user `postgres`, and only a socket in that folder leads to it. The S3
store is moto's server, in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helpers_cli import environment, free_port

ADMIN = "admin"
BUCKET = "packs"
START_SECONDS = 180
AUTH = """[mlflow]
default_permission = READ
database_uri = {database_uri}
admin_username = {admin}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = {auth_cache_seconds}
"""


def postgres_programs() -> Path | None:
    """The folder with `initdb` and `postgres`, which Debian keeps off the path; None where
    PostgreSQL is not installed.
    """
    folders = [
        Path(found).resolve().parent for name in ("postgres",) if (found := shutil.which(name))
    ]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def why_not() -> str | None:
    """What this machine lacks for the servers, if anything."""
    if postgres_programs() is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "PostgreSQL does not run as root, and setpriv is not installed (Debian: util-linux)"
    return None


@dataclass(kw_only=True)
class Process:
    """A server of ours; `log` is all it prints."""

    running: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        """End it and what it started."""
        if self.running.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running.pid, signal.SIGINT)
        try:
            self.running.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait(20)

    def wait_until(self, pattern: str) -> re.Match[str]:
        """The first match of `pattern` in the log."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.running.poll() is None:
            if found := re.search(pattern, self.log.read_text()):
                return found
            time.sleep(0.1)
        raise RuntimeError(f"{self.log.stem} did not start: {self.log.read_text()[-2000:]}")


@dataclass(kw_only=True)
class TrackingServer:
    """The three servers and how to reach them."""

    uri: str
    s3: dict[str, str]
    admin_password: str
    database_uri: str
    postgres: Process
    store: Process
    mlflow: Process
    passwords: dict[str, str] = field(default_factory=dict)

    def as_user(self, name: str) -> dict[str, str]:
        """The settings with which a client is the user `name`, who is made at first."""
        if name == ADMIN:
            return self._settings(name, self.admin_password)
        if name not in self.passwords:
            self.passwords[name] = secrets.token_urlsafe(16)
            self._make_user(name)
        return self._settings(name, self.passwords[name])

    def _settings(self, name: str, password: str) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    def _make_user(self, name: str) -> None:
        import requests

        content = {"username": name, "password": self.passwords[name]}
        requests.post(
            f"{self.uri}/api/2.0/mlflow/users/create",
            json=content,
            auth=(ADMIN, self.admin_password),
            timeout=60,
        ).raise_for_status()

    def stored(self) -> dict[str, int]:
        """What lies in the S3 store: size in bytes by key."""
        return {
            entry["Key"]: entry["Size"]
            for entry in _s3_client(self.s3).list_objects_v2(Bucket=BUCKET).get("Contents", ())
        }


@contextlib.contextmanager
def tracking_server(folder: Path, *, auth_cache_seconds: int = 60) -> Iterator[TrackingServer]:
    """All three, started; ended when the context is left.

    Args:
        folder: takes logs and settings.
        auth_cache_seconds: how long MLflow remembers that a password was right; 0, its default,
            hashes it for every request.
    """
    with contextlib.ExitStack() as stack:
        postgres, database_uri = _start_postgres(folder, stack)
        store, s3 = _start_store(folder, stack)
        password = secrets.token_urlsafe(16)
        settings = folder / "basic_auth.ini"
        settings.touch(mode=0o600)
        auth = AUTH.format(
            database_uri=database_uri.replace("/mlflow?", "/auth?"),
            admin=ADMIN,
            auth_cache_seconds=auth_cache_seconds,
        )
        settings.write_text(auth)
        port = free_port()
        options = (
            f"--host 127.0.0.1 --port {port} --workers 1 --app-name basic-auth"
            f" --allowed-hosts 127.0.0.1:{port} --backend-store-uri {database_uri}"
            f" --artifacts-destination s3://{BUCKET}/mlflow"
        )
        secret = {
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": password,
        }
        changes = {**s3, **secret, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        mlflow = _start(
            "mlflow",
            [sys.executable, "-m", "mlflow", "server", *options.split()],
            folder,
            stack,
            **changes,
        )
        uri = f"http://127.0.0.1:{port}"
        _wait_until_healthy(mlflow, uri)
        yield TrackingServer(
            uri=uri,
            s3=s3,
            admin_password=password,
            database_uri=database_uri,
            postgres=postgres,
            store=store,
            mlflow=mlflow,
        )


def _start(
    name: str, command: list[str], folder: Path, stack: contextlib.ExitStack, **changes: str
) -> Process:
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        running = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(**changes),
            cwd=folder,
            start_new_session=True,
        )
    process = Process(running=running, log=log)
    stack.callback(process.stop)
    return process


def _start_postgres(folder: Path, stack: contextlib.ExitStack) -> tuple[Process, str]:
    import psycopg

    programs = postgres_programs()
    assert programs is not None
    # Not in `folder`: the user `postgres` may not enter what belongs to root. And short, as the
    # path of a socket must be.
    home = Path(tempfile.mkdtemp(prefix="taskpack-pg-"))
    stack.callback(shutil.rmtree, home, ignore_errors=True)
    as_postgres: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(home, "postgres", "postgres")
        as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
    made = [
        *as_postgres,
        str(programs / "initdb"),
        "-D",
        str(home / "data"),
        "-U",
        "taskpack",
        "--auth=trust",
        "--no-sync",
    ]
    subprocess.run(
        made, check=True, capture_output=True, cwd="/", env=environment(LC_ALL="C.UTF-8")
    )
    settings = ("listen_addresses=", f"unix_socket_directories={home}", "fsync=off")
    options = [text for setting in settings for text in ("-c", setting)]
    process = _start(
        "postgres",
        [*as_postgres, str(programs / "postgres"), "-D", str(home / "data"), *options],
        folder,
        stack,
        LC_ALL="C.UTF-8",
    )
    process.wait_until("ready to accept connections")
    with psycopg.connect(
        host=str(home), user="taskpack", dbname="postgres", autocommit=True
    ) as connection:
        for name in ("mlflow", "auth"):
            connection.execute(f"CREATE DATABASE {name}")
    return process, f"postgresql+psycopg://taskpack@/mlflow?host={home}"


def _start_store(folder: Path, stack: contextlib.ExitStack) -> tuple[Process, dict[str, str]]:
    process = _start(
        "s3", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], folder, stack
    )
    address = process.wait_until(r"Running on (http://127\.0\.0\.1:\d+)")[1]
    keys = {
        "AWS_ACCESS_KEY_ID": secrets.token_hex(8),
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    s3 = {"MLFLOW_S3_ENDPOINT_URL": address, **keys}
    _s3_client(s3).create_bucket(Bucket=BUCKET)
    return process, s3


def _s3_client(s3: dict[str, str]):  # type: ignore[no-untyped-def]
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=s3["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id=s3["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3["AWS_SECRET_ACCESS_KEY"],
        region_name=s3["AWS_DEFAULT_REGION"],
    )


def _wait_until_healthy(mlflow: Process, uri: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and mlflow.running.poll() is None:
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(f"{uri}/health", timeout=5),
        ):
            return
        time.sleep(0.2)
    raise RuntimeError(f"mlflow did not start: {mlflow.log.read_text()[-2000:]}")
