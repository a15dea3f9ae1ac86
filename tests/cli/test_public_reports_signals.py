"""Signals that a plan and a comparison are sent, as in public bug reports."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import COMMAND, descendants, environment, wait_until, write_task


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Starts the command with its output in files; whatever still runs at the end is killed."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str | Path) -> tuple[subprocess.Popen[bytes], Path, Path]:
        out, err = tmp_path / "out", tmp_path / "err"
        with out.open("w") as stdout, err.open("w") as stderr:
            processes.append(
                subprocess.Popen(
                    [COMMAND, *arguments],
                    env=environment(),
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
            )
        return processes[-1], out, err

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_sigterm_ends_a_plan_with_one_line(tmp_path: Path, started: Any) -> None:
    data = {"format": "drawn", "kind": "orientation", "train_samples": 2000, "test_samples": 40}
    task_file = write_task(tmp_path / "tasks", data=data)
    process, _, err = started("plan", task_file, "--workdir", tmp_path / "work")
    assert wait_until(
        lambda: "selecting connections: 1 of" in err.read_text() or process.poll() is not None, 120
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert err.read_text().splitlines()[-1] == "terminated; run the same command to start again"
    assert "Traceback" not in err.read_text()


@pytest.mark.slow
def test_sigterm_ends_a_comparison_and_everything_it_started(tmp_path: Path, started: Any) -> None:
    task_file = write_task(tmp_path / "tasks")
    process, out, err = started(
        "compare",
        task_file,
        "--methods",
        "linear,lora_1bit",
        "--seeds",
        "1",
        "--workdir",
        tmp_path / "work",
    )
    assert wait_until(
        lambda: ": trial 1 of " in out.read_text() or process.poll() is not None, 600
    ), out.read_text()
    family = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert err.read_text().splitlines() == [
        f"terminated; finished work is kept in {tmp_path / 'work'}; run the same command to"
        " continue"
    ]
    assert family
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in family), 30)
    assert [pid for pid in family if os.path.exists(f"/proc/{pid}")] == []
