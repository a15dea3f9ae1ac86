"""Killed and interrupted in every stage, one work folder from each to the next: the same command
goes on to the same result.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers_cli import (
    ONE_CPU,
    TIMEOUT_SECONDS,
    TRIALS,
    Answer,
    FinishedRun,
    descendants,
    environment,
    finished_run,
    one,
    taskpack,
    wait_until,
)
from helpers_forks import ForkedCommand

from pipeline.registry.store import open_registry
from pipeline.registry.trial_runs import PARENT_TAG, TRIAL_TAG

DAEMONS_GONE_SECONDS = 100  # most of Ray's end within seconds, two agents after a minute


@dataclass
class Journey:
    """One work folder through all interruptions, and what was seen on the way."""

    workdir: Path
    task_file: Path
    answers: dict[str, Answer] = field(default_factory=dict)
    families: dict[str, list[int]] = field(default_factory=dict)
    snapshots: dict[str, dict[Path, int]] = field(default_factory=dict)

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.workdir.glob(pattern))

    def snapshot(self) -> dict[Path, int]:
        """The finished results and when each was written."""
        patterns = (
            "data/bars/*",
            "selections/*.safetensors",
            "studies/*/trials/*.json",
            "studies/*/fits/*/pack.safetensors",
        )
        return {
            path: path.stat().st_mtime_ns for pattern in patterns for path in self.files(pattern)
        }

    def interrupt(
        self,
        name: str,
        when: Callable[[str], bool],
        how: signal.Signals,
        *options: str,
        ignores_sigint: bool = False,
        **changes: str,
    ) -> None:
        """Start the command, `changes` being of its environment, and send it `how` as soon as
        `when` of its output holds.
        """
        out, err = self.workdir.with_name(f"{name}.out"), self.workdir.with_name(f"{name}.err")
        process = ForkedCommand(
            ["run", self.task_file, "--workdir", self.workdir, *options],
            environment=environment(**changes),
            stdout=out,
            stderr=err,
            ignores_sigint=ignores_sigint,
        )
        wait_until(
            lambda: when(out.read_text()) or process.poll() is not None,
            TIMEOUT_SECONDS,
        )
        assert process.poll() is None, (
            f"{name}: it ended before it could be interrupted: {out.read_text()}{err.read_text()}"
        )
        self.families[name] = descendants(process.pid)
        process.send_signal(how)
        code = process.wait(TIMEOUT_SECONDS)
        self.answers[name] = Answer(code, out.read_text(), err.read_text())
        self.snapshots[name] = self.snapshot()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def journey(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    trip = Journey(tmp_path_factory.mktemp("journey") / "work", finished.task_file)

    seen: set[Path] = set()

    def workers_started(out: str) -> bool:
        new = (
            set(trip.files("selections/.selection-*/*")) - seen
        )  # a killed run leaves its own behind
        seen.update(new)
        return bool(new)

    def trial_written(out: str) -> bool:
        return "bars: search" in out and bool(trip.files("studies/*/trials/*.json"))

    workers = (
        "--selection-workers",
        "2",
    )  # a task as small as this one would be done in the command itself
    trip.interrupt("killed in prepare", lambda out: "bars: prepare" in out, signal.SIGKILL)
    trip.interrupt("killed in select", workers_started, signal.SIGKILL, *workers)
    trip.interrupt(
        "interrupted in select", workers_started, signal.SIGINT, *workers, ignores_sigint=True
    )
    trip.interrupt("interrupted in search", trial_written, signal.SIGINT, **ONE_CPU)
    for name, how in (
        ("terminated in search", signal.SIGTERM),
        ("killed in search", signal.SIGKILL),
    ):
        before = len(trip.files("studies/*/trials/*.json"))
        trip.interrupt(
            name,
            lambda out, before=before: len(trip.files("studies/*/trials/*.json")) > before,
            how,
            **ONE_CPU,
        )  # type: ignore[misc]
    trip.interrupt("killed in fit", lambda out: "bars: fit" in out, signal.SIGKILL, **ONE_CPU)
    trip.interrupt(
        "killed in register", lambda out: "bars: register" in out, signal.SIGKILL, **ONE_CPU
    )
    trip.answers["last"] = taskpack("run", trip.task_file, "--workdir", trip.workdir)
    trip.snapshots["last"] = trip.snapshot()
    return trip


def test_the_last_run_registers_one_version(journey: Journey) -> None:
    assert journey.answers["last"].code == 0, journey.answers["last"].err
    assert journey.answers["last"].err == ""
    packs = taskpack("ls", "--workdir", journey.workdir, "--json").json()
    assert [(pack["name"], pack["version"], pack["aliases"]) for pack in packs] == [
        ("bars", 1, ["champion"])
    ]


def test_mlflow_shows_each_trial_once(journey: Journey) -> None:
    registry = open_registry(f"sqlite:///{journey.workdir}/mlflow.db", journey.workdir)
    runs = registry.client.search_runs([registry.store.experiment_id])
    (parent,) = (run.info.run_id for run in runs if PARENT_TAG not in run.data.tags)
    trials = sorted(
        run.data.tags[TRIAL_TAG] for run in runs if run.data.tags.get(PARENT_TAG) == parent
    )
    assert len(runs) == 1 + len(trials)
    assert trials == sorted(path.stem for path in journey.files("studies/*/trials/*.json"))


def test_nothing_finished_was_written_again(journey: Journey) -> None:
    seen: dict[Path, int] = {}
    for name, snapshot in journey.snapshots.items():
        rewritten = [str(path) for path, written in seen.items() if snapshot.get(path) != written]
        assert not rewritten, f"{name}: {rewritten}"
        seen = snapshot


def test_half_made_folders_are_cleared_away(journey: Journey) -> None:
    assert [
        path.name
        for folder in ("data", "selections")
        for path in (journey.workdir / folder).glob(".*")
    ] == []


def test_each_stage_was_interrupted_where_it_says(journey: Journey) -> None:
    def count(name: str, pattern: str) -> int:
        return len([path for path in journey.snapshots[name] if path.match(pattern)])

    assert count("interrupted in select", "selections/*") == 0
    assert count("interrupted in search", "selections/*") == 1
    assert 1 <= count("interrupted in search", "trials/*.json") < TRIALS
    assert count("killed in fit", "trials/*.json") == TRIALS
    assert count("killed in fit", "pack.safetensors") == 0
    assert count("killed in register", "pack.safetensors") == 1


def test_the_result_is_that_of_a_run_in_peace(journey: Journey, finished: FinishedRun) -> None:
    selection = one(journey.workdir.glob("selections/*.safetensors"))
    assert (selection.name, selection.read_bytes()) == (
        finished.selection.name,
        finished.selection.read_bytes(),
    )
    pack = one(journey.workdir.glob("studies/*/fits/*/pack.safetensors"))
    assert pack.read_bytes() == finished.pack.read_bytes()
    assert trial_curves(journey.workdir) == trial_curves(finished.workdir)


def trial_curves(workdir: Path) -> dict[str, object]:
    records = [json.loads(path.read_text()) for path in workdir.glob("studies/*/trials/*.json")]
    return {record["id"]: (record["point"], record["state"], record["curve"]) for record in records}


@pytest.mark.parametrize(
    "name", ["killed in select", "interrupted in select", "terminated in search"]
)
def test_nothing_of_ray_outlives_the_driver(journey: Journey, name: str) -> None:
    def alive() -> list[int]:
        return [pid for pid in journey.families[name] if os.path.exists(f"/proc/{pid}")]

    assert journey.families[name]
    wait_until(lambda: not alive(), DAEMONS_GONE_SECONDS)
    assert alive() == []


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("interrupted in select", 130, "interrupted"),
        ("interrupted in search", 130, "interrupted"),
        ("terminated in search", 143, "terminated"),
    ],
)
def test_a_signal_ends_the_command_with_one_line_that_says_what_to_do(
    journey: Journey, name: str, code: int, word: str
) -> None:
    answer = journey.answers[name]
    assert answer.code == code
    assert answer.err.splitlines() == [
        f"{word}; finished work is kept in {journey.workdir}; run the same command to continue"
    ]
