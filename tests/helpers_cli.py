"""What the tests of the command line share: a task small enough to run whole in half a minute, the
command in this process or in its own.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from helpers_forks import ForkedCommand

from pipeline.cli import app as cli
from pipeline.registry.connection import initialise_sqlite

COMMAND = Path(sys.executable).with_name("taskpack")
TIMEOUT_SECONDS = 600

BACKBONE: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    "weights": "random",
}
TASK: dict[str, Any] = {
    "name": "bars",
    "description": "which of 8 ways a bar lies",
    "data": {"format": "drawn", "kind": "orientation", "train_samples": 80, "test_samples": 40},
    "input": {"size_px": 32, "flip": False},
    "backbone": "backbone.yaml",
    "recipe": {
        "connections": {"top_k": 1},
        "smoa": {"experts": 2, "width": 4},
        "training": {"epochs": 8, "batch_size": 16, "precision": "fp32"},
    },
    "search": {"bits": [2, 4, 6, 8], "top_k": [1, 2]},
    "selection": {"batch_size": 16},
}
TRIALS = 8
ONE_CPU = {"RAY_OVERRIDE_RESOURCES": '{"CPU": 1}'}
"""Settings that make a private Ray start one worker, because each spends seconds on imports."""


def write_task(folder: Path, **changes: Any) -> Path:
    """The tiny task with other sections, as `NAME.yaml` beside its backbone's file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "backbone.yaml").exists():
        (folder / "backbone.yaml").write_text(yaml.safe_dump(BACKBONE))
    path = folder / f"{changes.get('name', TASK['name'])}.yaml"
    path.write_text(yaml.safe_dump({**TASK, **changes}))
    return path


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Answer:
    """What a command gave back. `words` are its messages with line breaks taken out."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        return " ".join((self.out + self.err).split())

    def json(self) -> Any:
        return json.loads(self.out)


def taskpack(*arguments: str | Path) -> Answer:
    """The command, run in this process: quick, because everything is imported."""
    out, err, given = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["taskpack", *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            cli.main()
    finally:
        sys.argv = given
    code = ended.value.code
    return Answer(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def environment(**changes: str) -> dict[str, str]:
    """Of a command in its own process: this one's, without what pytest adds, at 80 columns."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST", "PYTHONWARNINGS"))
    }
    return {**kept, "COLUMNS": "80", **changes}


def taskpack_process(*arguments: str | Path, **changes: str) -> Answer:
    """The command in its own process; `changes` are of its environment."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        command = ForkedCommand(
            arguments, environment=environment(**changes), stdout=out, stderr=err
        )
        try:
            code = command.wait(TIMEOUT_SECONDS)
        finally:
            command.send_signal(signal.SIGKILL)
        return Answer(code, out.read_text(), err.read_text())


@dataclass(frozen=True)
class FinishedRun:
    """A work folder after `taskpack run`, the task file it was given, and what the command said."""

    workdir: Path
    task_file: Path
    answer: Answer

    @property
    def pack(self) -> Path:
        return one(self.workdir.glob("studies/*/fits/*/pack.safetensors"))

    @property
    def selection(self) -> Path:
        return one(self.workdir.glob("selections/*.safetensors"))


def one(paths: Iterator[Path]) -> Path:
    """The only one of `paths`."""
    found = list(paths)
    assert len(found) == 1, found
    return found[0]


@functools.cache
def finished_run(base: Path) -> FinishedRun:
    """One whole run for all test files, copied to `base`, the temporary folder of this process.
    Tests that change anything work on a copy of that.
    """
    shared, own = _shared(base) / "run", base / "finished"
    with FileLock(shared.with_suffix(".lock")):
        if not (said := shared / "answer.json").exists():
            task_file = write_task(shared / "tasks")
            answer = taskpack_process("run", task_file, "--workdir", shared / "work", **ONE_CPU)
            said.write_text(json.dumps(asdict(answer)))
    shutil.copytree(shared, own, ignore=shutil.ignore_patterns(".lock"))
    answer = json.loads(said.read_text().replace(str(shared), str(own)))
    return FinishedRun(own / "work", own / "tasks" / "bars.yaml", Answer(**answer))


def _shared(base: Path) -> Path:
    """The folder that all processes of these tests share."""
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@functools.cache
def empty_registry(base: Path) -> Path:
    """A migrated, empty registry: migrations take seconds, a copy none."""
    folder = _shared(base) / "empty_registry"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            initialise_sqlite(folder / "mlflow.db", folder / "artifacts")
    return folder / "mlflow.db"


def new_workdir(base: Path, folder: Path) -> Path:
    """A work folder in `folder` that holds nothing but an empty registry."""
    workdir = folder / "work"
    workdir.mkdir(parents=True)
    shutil.copyfile(empty_registry(base), workdir / "mlflow.db")
    return workdir


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found
