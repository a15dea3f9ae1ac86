"""Batches on a Ray cluster, from outside it: submitted, monitored and stopped through the jobs
server.

A job carries the description of its batch and nothing else: one self-contained task file per task.
The code is in the cluster's image, or a package that is sent along. On the head, the job is
`taskpack run tasks --address auto`, so a batch that is submitted again resumes from its work
folder. A job's id consists of the batch and the number of the attempt: two concurrent submissions
have the same id, and the server accepts it once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from pipeline.driver.monitor.state import BATCH_VARIABLE, BatchState, parse_state, state_file_name
from pipeline.errors import ClusterError, SpecError
from pipeline.specs import Task
from pipeline.specs.paths import local_paths

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ACTIVE = ("PENDING", "RUNNING")
SUCCEEDED = "SUCCEEDED"
_BATCH_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_ANSWER_SECONDS = 10
_AGENT_SECONDS = 30
_STOP_SECONDS = 60
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Batch:
    """What a job runs: its task files by name, and the options of `taskpack run`."""

    files: dict[str, str]
    options: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the description, independent of the order of tasks and options."""
        return hashlib.sha256(
            json.dumps([self.files, self.options], sort_keys=True).encode()
        ).hexdigest()

    @property
    def default_id(self) -> str:
        """The default name of the batch."""
        return f"batch-{self.digest[:12]}"


def describe(
    tasks: Sequence[Task], *, workdir: str, options: Sequence[str] = (), shared: Sequence[Path] = ()
) -> Batch:
    """Describe a batch of `tasks` whose results are kept in `workdir`, a folder that all nodes
    share.

    Args:
        options: further options of `taskpack run`.
        shared: folders that the cluster sees at the same path as this machine.

    Raises:
        SpecError: `workdir` is not absolute, or a task reads local data, which is not sent.
    """
    if not workdir.startswith("/"):
        raise SpecError(
            f"--workdir: given {workdir!r}; expected an absolute path: a folder that every node of"
            " the cluster sees"
        )
    folders = [folder for given in shared for folder in (given.absolute(), given.resolve())]
    for task in tasks:
        for key, path in local_paths(task):
            if not any(Path(path).is_relative_to(folder) for folder in folders):
                raise SpecError(
                    f"task {task.name}: {key}: {path} is a path of this machine, and submit sends"
                    " no data. Use a URL, or a path that begins with $TASKPACK_DATA, which the"
                    " cluster sets for itself; where the cluster sees a folder at the same path,"
                    " name it with --shared"
                )
    files = {
        f"{task.name}.yaml": yaml.safe_dump(task.model_dump(mode="json"), allow_unicode=True)
        for task in tasks
    }
    return Batch(files, ("--workdir", workdir, *options))


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One job of a batch, as reported by the server.

    `state`: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; times in seconds since 1970; `node`:
    the node of its driver, once it runs.
    """

    batch: str
    attempt: int
    state: str
    tasks: int
    digest: str
    job: str
    message: str
    started: float | None
    ended: float | None
    node: str | None = None

    @property
    def is_active(self) -> bool:
        """Whether it is running or pending."""
        return self.state in ACTIVE


class JobServer:
    """The batches of the cluster whose jobs server is at `address` (`http://HEAD:8265`).

    Every method raises ClusterError if the server does not answer.

    Args:
        client: client of the server; default: Ray's own.
    """

    def __init__(self, address: str, client: Any = None) -> None:
        self.address = address.rstrip("/")
        self._client = client if client is not None else _connect(self.address)
        self._headers = _headers()

    def submit(
        self,
        batch: Batch,
        batch_id: str | None = None,
        *,
        working_dir: Path | None = None,
        python: str = "python",
    ) -> tuple[Attempt, bool]:
        """Start `batch` unless it is running or done; return its last attempt, and whether this
        call started it.

        Args:
            working_dir: a folder whose package `pipeline` is sent along and replaces the cluster's.
            python: the cluster's interpreter, as found by the head's shell.

        Raises:
            SpecError: The id is invalid, or belongs to another batch.
        """
        batch_id = batch.default_id if batch_id is None else batch_id
        if not _BATCH_ID.fullmatch(batch_id):
            raise SpecError(
                f"--batch-id: given {batch_id!r}; expected up to 63 letters, digits, dots, dashes"
                " and underscores"
            )
        if working_dir is not None and not (working_dir / "pipeline" / "cli.py").is_file():
            raise SpecError(
                f"--working-dir: given {str(working_dir)!r}; expected a folder with taskpack's"
                " package `pipeline`, such as a clone"
            )
        last = self._last(batch_id)
        if last is not None and (last.is_active or last.state == SUCCEEDED):
            return _same(last, batch), False
        attempt = last.attempt + 1 if last is not None else 1
        try:
            self._start(batch, batch_id, attempt, working_dir, python)
        except ClusterError:
            meanwhile = self._last(batch_id)
            if meanwhile is None or meanwhile.attempt < attempt:
                raise
            return _same(meanwhile, batch), False  # another submission was faster
        return self.find(batch_id), True

    def _start(
        self, batch: Batch, batch_id: str, attempt: int, working_dir: Path | None, python: str
    ) -> None:
        command = (
            python,
            "-m",
            "pipeline.cli.app",
            "run",
            "tasks",
            "--address",
            "auto",
            *batch.options,
        )
        notes = {
            "batch": batch_id,
            "attempt": str(attempt),
            "digest": batch.digest,
            "tasks": str(len(batch.files)),
        }
        with tempfile.TemporaryDirectory(prefix="taskpack-") as folder:
            tasks = Path(folder, "tasks")
            tasks.mkdir()
            for name, text in batch.files.items():
                (tasks / name).write_text(text, encoding="utf-8")
            job = f"{batch_id}.{attempt}"
            environment: dict[str, Any] = {
                "working_dir": folder,
                "excludes": ["__pycache__"],
                "env_vars": {BATCH_VARIABLE: job},
            }
            if working_dir is not None:
                environment["py_modules"] = [str((working_dir / "pipeline").resolve())]
            with self._named_errors():
                self._submit(
                    entrypoint=shlex.join(command),
                    submission_id=job,
                    runtime_env=environment,
                    metadata={f"taskpack_{key}": value for key, value in notes.items()},
                )

    def _submit(self, **job: Any) -> None:
        """Submit a job. A head that has just started refuses until its agent is up: wait for it."""
        deadline = time.monotonic() + _AGENT_SECONDS
        while True:
            try:
                self._client.submit_job(**job)
                return
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    def attempts(self) -> list[Attempt]:
        """All attempts of all batches of this cluster, newest first."""
        with self._named_errors():
            jobs = self._client.list_jobs()
        found = [_attempt(job) for job in jobs if (job.metadata or {}).get("taskpack_batch")]
        return sorted(
            found,
            key=lambda attempt: (attempt.started or float("inf"), attempt.attempt),
            reverse=True,
        )

    def _last(self, batch_id: str) -> Attempt | None:
        return max(
            (attempt for attempt in self.attempts() if attempt.batch == batch_id),
            key=lambda attempt: attempt.attempt,
            default=None,
        )

    def find(self, batch_id: str) -> Attempt:
        """The last attempt of a batch. Raises ClusterError if the cluster has no such batch."""
        last = self._last(batch_id)
        if last is None:
            known = sorted({attempt.batch for attempt in self.attempts()})
            raise ClusterError(
                f"{batch_id}: the cluster at {self.address} has no such"
                f" batch{'; it has ' + ', '.join(known[:10]) if known else ''}. A cluster that was"
                " restarted has forgotten its batches: submit this one again, it resumes from its"
                " work folder"
            )
        return last

    def progress(self, attempt: Attempt) -> BatchState | None:
        """The progress of an attempt as last written by its driver; None if there is none, or if
        its version of taskpack differs.
        """
        import requests

        if attempt.node is None:
            return None
        wanted = {"node_id": attempt.node, "filename": state_file_name(attempt.job), "lines": "-1"}
        with self._named_errors():
            answer = requests.get(
                f"{self.address}/api/v0/logs/file",
                params=wanted,
                headers=self._headers,
                timeout=_ANSWER_SECONDS,
            )
        try:
            return parse_state(answer.json()) if answer.ok else None
        except ValueError:
            return None

    def logs(self, batch_id: str) -> str:
        """The output of the last attempt of a batch so far."""
        attempt = self.find(batch_id)
        with self._named_errors():
            return self._client.get_job_logs(attempt.job)

    def follow(self, batch_id: str, write: Callable[[str], object]) -> Attempt:
        """Pass on the output of the last attempt of a batch until it ends, and return the ended
        attempt.
        """
        job = self.find(batch_id).job

        async def copy() -> None:
            async for text in self._client.tail_job_logs(job):
                write(text)

        with self._named_errors():
            asyncio.run(copy())
        return self.find(batch_id)

    def stop(self, batch_id: str) -> tuple[Attempt, bool]:
        """Stop the last attempt of a batch and wait for its end; return it, and whether it was
        running.
        """
        attempt = self.find(batch_id)
        if not attempt.is_active:
            return attempt, False
        with self._named_errors():
            self._client.stop_job(attempt.job)
        deadline = time.monotonic() + _STOP_SECONDS
        while (attempt := self.find(batch_id)).is_active:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{batch_id}: still running {_STOP_SECONDS} s after it was told to stop; try"
                    " again, or look at its logs"
                )
            time.sleep(_POLL_SECONDS)
        return attempt, True

    def _named_errors(self) -> contextlib.AbstractContextManager[None]:
        return _named_errors(self.address)


def _same(attempt: Attempt, batch: Batch) -> Attempt:
    if attempt.digest != batch.digest:
        state = "running" if attempt.is_active else "finished"
        raise SpecError(
            f"--batch-id: given {attempt.batch!r}, but other tasks or options with this id are"
            f" {state}; choose another id, or stop it"
        )
    return attempt


def _attempt(job: Any) -> Attempt:
    notes = {key.removeprefix("taskpack_"): value for key, value in job.metadata.items()}
    return Attempt(
        batch=notes["batch"],
        attempt=int(notes.get("attempt", 1)),
        state=str(job.status),
        tasks=int(notes.get("tasks", 0)),
        digest=notes.get("digest", ""),
        job=job.submission_id,
        message=job.message or "",
        started=job.start_time / 1000 if job.start_time else None,
        ended=job.end_time / 1000 if job.end_time else None,
        node=job.driver_node_id,
    )


def _connect(address: str) -> Any:
    """Ray's client for `address`, with the token of this machine."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(
            f"--address: given {address!r}; expected the address of the cluster's jobs server, such"
            " as http://head:8265"
        )
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:  # Ray itself would wait for minutes where packets are dropped
        socket.create_connection((parts.hostname, port), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, str(error)) from None
    from ray.job_submission import JobSubmissionClient

    with _named_errors(address), _without_address_variables():
        return JobSubmissionClient(address, headers=_headers())


def _headers() -> dict[str, str] | None:
    token = _token()
    return {"Authorization": f"Bearer {token}"} if token else None


def _token() -> str | None:
    """The token that Ray would use: RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH, or the user's.
    Ray reads them only when told to.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


@contextlib.contextmanager
def _without_address_variables() -> Iterator[None]:
    """Unset variables that take precedence in Ray over an explicit address."""
    kept = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextlib.contextmanager
def _named_errors(address: str) -> Iterator[None]:
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise _unauthorized(address, str(error)) from None
    except aiohttp.WSServerHandshakeError as error:
        if error.status in (401, 403):
            raise _unauthorized(address, "failed" if error.status == 403 else "required") from None
        raise ClusterError(
            f"{address}: the jobs server refused ({error.status}); is this the address of a Ray"
            " head?"
        ) from None
    except (
        ConnectionError,
        requests.ConnectionError,
        requests.Timeout,
        aiohttp.ClientConnectionError,
    ) as error:
        raise _unreachable(address, str(error).splitlines()[0][:200]) from None
    except (RuntimeError, ValueError, requests.RequestException, aiohttp.ClientError) as error:
        detail = [
            line for line in str(error).replace("\\n", "\n").splitlines() if line.strip()
        ] or [type(error).__name__]
        raise ClusterError(
            f"{address}: the jobs server refused:"
            f" {detail[0][:200]}{' ... ' + detail[-1][:200] if detail[1:] else ''}"
        ) from None


def _unauthorized(address: str, detail: str) -> ClusterError:
    if detail.startswith("Authentication failed") or detail == "failed":
        return ClusterError(
            f"{address}: the token is not this cluster's (403); set RAY_AUTH_TOKEN to the token"
            " that its head was started with"
        )
    return ClusterError(
        f"{address}: the cluster asks for a token, and none was sent (401); set RAY_AUTH_TOKEN to"
        " that of its head"
    )


def _unreachable(address: str, detail: str) -> ClusterError:
    return ClusterError(
        f"--address: no jobs server answers at {address} ({detail}); check host and port, and that"
        " the head was started with its dashboard (ray[default]) where this machine can reach it,"
        " or forward the port"
    )
