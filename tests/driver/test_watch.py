"""What a batch tells of itself: every event once and without secrets, a state that is always whole,
times left that are earned, metrics of Ray.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_cli import taskpack
from helpers_watch import STANDARD_ERROR, end_trial, make_study

from pipeline.cli.status_table import state_table, summary
from pipeline.driver.monitor import batch_watch as batch
from pipeline.driver.monitor import events
from pipeline.driver.monitor.batch_watch import BatchWatch, batch_name
from pipeline.driver.monitor.events import EventLog
from pipeline.driver.monitor.state import (
    BATCH_VARIABLE,
    BatchState,
    TaskState,
    parse_state,
    read_state,
)
from pipeline.driver.monitor.tracked import TrackedTask, remaining_seconds
from pipeline.driver.stages import no_progress
from pipeline.registry.pack_record import RegisteredPack
from pipeline.search.trial_record import TrialRecord
from pipeline.specs import Task
from pipeline.utils.durations import duration
from pipeline.utils.redaction import without_secrets


def read_events(workdir: Path) -> list[dict]:
    return [
        json.loads(line) for line in (workdir / "logs" / "batch.jsonl").read_text().splitlines()
    ]


# --- the log of events ----------------------------------------------------------------------------


def test_a_log_stays_within_its_bounds_and_keeps_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "FILE_BYTES", 5000)
    log = EventLog(tmp_path / "logs" / "batch.jsonl", batch="b")
    for number in range(500):
        log.write("trial", number=number, nothing=None, text="x" * 10_000)
    log.close()
    files = sorted((tmp_path / "logs").iterdir())
    assert [path.name for path in files] == ["batch.jsonl", "batch.jsonl.1"]
    assert sum(path.stat().st_size for path in files) <= 2 * 5000
    newest = read_events(tmp_path)[-1]
    assert (newest["batch"], newest["event"], newest["number"], len(newest["text"])) == (
        "b",
        "trial",
        499,
        events.TEXT_CHARACTERS,
    )
    assert "nothing" not in newest


def test_threads_do_not_tear_each_others_lines(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "logs" / "batch.jsonl")
    threads = [
        threading.Thread(target=lambda: [log.write("e", text="y" * 300) for _ in range(100)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(read_events(tmp_path)) == 400


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    log = EventLog(tmp_path / "logs" / "batch.jsonl")
    log.write("started")
    log.close()


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("http://me:hunter22@mlflow:5000: refused", "hunter22"),
        ("https://store/a.tar?X-Amz-Signature=abc123&b=1: 403", "abc123"),
        ("the server said: bad token 's3same'", "s3same"),
    ],
)
def test_no_secret_is_written(text: str, secret: str) -> None:
    variables = {"MLFLOW_TRACKING_TOKEN": "s3same", "HOME": "https", "MY_PASSWORD": "a"}
    assert secret in text
    assert secret not in without_secrets(text, variables)
    assert without_secrets(text, variables).split()[-1] == text.split()[-1].replace(secret, "***")
    assert (
        without_secrets("http://head:8265/path of a user@home: 50 %")
        == "http://head:8265/path of a user@home: 50 %"
    )


# --- time left ------------------------------------------------------------------------------------


def test_time_left_is_that_of_the_trials_that_ended(tiny_task: Task, tmp_path: Path) -> None:
    study, tracked = make_study(tiny_task, tmp_path), TrackedTask("tiny", fit_ratio=1.5)
    tracked.enter("search", 100.0, "")
    proposed = [study.next_trial() for _ in range(2)]
    tracked.follow(study)
    assert (tracked.trials, tracked.trials_running, tracked.seconds_left(110.0)) == (4, 2, None)
    end_trial(study, proposed[0], 0.5, 10.0)
    tracked.follow(study)
    assert tracked.seconds_left(110.0) == 10.0 * 3 / 1 + 1.5 * 10.0
    study.report(proposed[1], 1, 0.6, STANDARD_ERROR)  # half a trial more
    tracked.follow(study)
    assert tracked.seconds_left(115.0) == 15.0 * 2.5 / 1.5 + 1.5 * 10.0
    tracked.enter("fit", 130.0, "")
    assert tracked.seconds_left(134.0) == 11.0
    assert tracked.seconds_left(146.0) is None  # it should be over: what is left cannot be told


def test_trials_of_earlier_runs_say_nothing_of_this_ones_pace(
    tiny_task: Task, tmp_path: Path
) -> None:
    first = make_study(tiny_task, tmp_path)
    for _ in range(2):
        end_trial(first, first.next_trial(), 0.5, 10.0)
    study, tracked = make_study(tiny_task, tmp_path), TrackedTask("tiny")
    tracked.enter("search", 100.0, "")
    number = study.next_trial()
    tracked.follow(study)
    assert (number, tracked.trials_done, tracked.trials, tracked.seconds_left(101.0)) == (
        2,
        2,
        4,
        None,
    )
    end_trial(study, number, 0.5, 10.0)
    tracked.follow(study)
    assert tracked.seconds_left(120.0) == 20.0 + 10.0


def test_without_anything_done_nothing_is_left_to_say() -> None:
    assert remaining_seconds(0, 5, 100) is None
    assert remaining_seconds(2, 1, 100) == 50


def test_the_best_trial_so_far_is_shown_until_the_champion_is_chosen(
    tiny_task: Task, tmp_path: Path
) -> None:
    study, tracked = make_study(tiny_task, tmp_path), TrackedTask("tiny")
    for metric in (0.5, 0.7, 0.702):  # of 1000, 2000 and 4000 bytes
        end_trial(study, study.next_trial(), metric, 1.0)
    tracked.follow(study)
    state = tracked.state(0.0)
    assert (state.val_metric, state.size_bytes, state.trials_done) == (0.702, 4000, 3)
    tracked.take(study.all_records(), study.records[1])
    state = tracked.state(0.0)
    assert (state.val_metric, state.size_bytes, state.trials_done) == (0.7, 2000, 3)


# --- the watch ------------------------------------------------------------------------------------


def pack(task: str) -> RegisteredPack:
    metrics = {"test_metric": 0.5, "val_metric": 0.6, "size_bytes": 2000.0}
    return RegisteredPack(
        **{
            "name": task,
            "version": 1,
            "aliases": ("champion",),
            "model_id": "m",
            "task": task,
            "metrics": metrics,
            "params": {},
            "tags": {},
        },
        **{"size_bytes": 2000, "pack_digest": "d", "created": None},
    )


def watched_batch(tiny_task: Task, tmp_path: Path) -> TrialRecord:
    """The best trial of a batch of two tasks, one of which fails; its state is copied."""
    told: list[tuple] = []
    with BatchWatch(
        tmp_path,
        "b.1",
        ["tiny", "other"],
        copies=[tmp_path / "copy.json"],
        on_progress=lambda *said: told.append(said),
    ) as watch:
        watch.progress("tiny", "prepare", 0.0, "")
        watch.progress("tiny", "prepare", 1.0, "")
        watch.progress("other", "failed", 1.0, "https://user:password@host is away")
        watch.progress("tiny", "search", 0.0, "")
        study = make_study(tiny_task, tmp_path / "trials")
        for metric in (0.5, 0.7):
            number = study.next_trial()
            watch.study(study, samples=80, fit_samples=100)
            end_trial(study, number, metric, 4.0)
            watch.study(study, samples=80, fit_samples=100)
        watch.searched("tiny", study.all_records(), study.records[1])
        watch.progress("tiny", "register", 0.0, "")
        watch.registered("tiny", study.records[1].id, pack("tiny"))
        watch.progress("tiny", "done", 1.0, "")
    assert len(told) == 6
    return study.records[1]


def test_a_batch_is_logged_event_by_event(tiny_task: Task, tmp_path: Path) -> None:
    best = watched_batch(tiny_task, tmp_path)
    found = read_events(tmp_path)
    assert {event["batch"] for event in found} == {"b.1"}
    assert [(event["event"], event.get("stage")) for event in found] == [
        ("started", None),
        *(("stage", stage) for stage in ("prepare", "waiting", "failed", "search")),
        *[("trial", "search")] * 2,
        ("stage", "register"),
        ("registered", "register"),
        ("stage", "done"),
        ("ended", None),
    ]
    trial = found[6]
    assert (trial["trial"], trial["size_bytes"], trial["val_metric"], trial["epochs"]) == (
        best.id,
        2000,
        0.7,
        2,
    )
    assert trial["images_per_second"] == 80 * 2 / 4.0
    assert (found[-1]["done"], found[-1]["failed"]) == (1, 1)
    assert (
        "password"
        not in (tmp_path / "logs" / "batch.jsonl").read_text()
        + (tmp_path / "state.json").read_text()
    )


def test_the_state_of_a_batch_is_kept_and_copied(tiny_task: Task, tmp_path: Path) -> None:
    watched_batch(tiny_task, tmp_path)
    state = read_state(tmp_path)
    assert state is not None
    assert state == parse_state(json.loads((tmp_path / "copy.json").read_text()))
    assert (state.batch, state.is_over, state.seconds_left, state.stages) == (
        "b.1",
        True,
        0.0,
        {"done": 1, "failed": 1},
    )
    assert (state.tasks[0].trials_done, state.tasks[0].val_metric, state.tasks[0].size_bytes) == (
        2,
        0.7,
        2000,
    )


def test_the_state_tells_what_the_last_trial_made_of_its_gpu(
    tiny_task: Task, tmp_path: Path
) -> None:
    usage = {"waiting": 0.1, "gpu_busy": 0.87, "gpu_memory_bytes": 3 * 2**30}
    with BatchWatch(tmp_path, "b", ["tiny"], on_progress=no_progress) as watch:
        study = make_study(tiny_task, tmp_path / "trials")
        end_trial(study, study.next_trial(), 0.5, 8.0)
        end_trial(study, study.next_trial(), 0.7, 4.0, **usage)
        watch.study(study, samples=80, fit_samples=100)
    (shown,) = taskpack("status", "--workdir", tmp_path, "--json").json()["tasks"]
    assert {name: shown[name] for name in ("images_per_second", *usage)} == {
        "images_per_second": 80 * 2 / 4.0,
        **usage,
    }
    assert "images/s GPU" in taskpack("status", "--workdir", tmp_path).words


def test_the_state_is_written_soon_after_an_event_and_as_a_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_for_stage(stage: str) -> BatchState:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            state = read_state(tmp_path)
            if state is not None and state.tasks[0].stage == stage:
                return state
            time.sleep(0.01)
        raise AssertionError(stage)

    monkeypatch.setattr(batch, "WRITE_SECONDS", 0.05)
    monkeypatch.setattr(batch, "HEARTBEAT_SECONDS", 0.2)
    with BatchWatch(tmp_path, "b", ["one"], on_progress=no_progress) as watch:
        assert not wait_for_stage("waiting").is_over
        watch.progress("one", "fit", 0.0, "")
        before = wait_for_stage("fit")
        deadline = time.monotonic() + 20
        while (
            again := wait_for_stage("fit")
        ).written == before.written and time.monotonic() < deadline:
            time.sleep(0.02)
        assert again.written > before.written
    assert read_state(tmp_path).is_over  # type: ignore[union-attr]


def test_an_interrupted_batch_says_so(tmp_path: Path) -> None:
    def interrupted() -> None:
        with BatchWatch(tmp_path, "b", ["one"], on_progress=no_progress) as watch:
            watch.progress("one", "search", 0.0, "")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_events(tmp_path)[-1]["remark"] == "KeyboardInterrupt"
    answer = taskpack("status", "--workdir", tmp_path)
    assert "one search" in answer.words
    assert "the run ended early; run the same command to continue" in answer.words


def test_a_state_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with BatchWatch(
        tmp_path, "b", ["one"], copies=[tmp_path / "file" / "copy.json"], on_progress=no_progress
    ) as watch:
        watch.progress("one", "done", 1.0, "")
    assert read_state(tmp_path).stages == {"done": 1}  # type: ignore[union-attr]


def test_time_left_of_a_batch_is_that_of_the_tasks_that_searched(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(batch.time, "time", lambda: now[0])
    with BatchWatch(
        tmp_path, "b", ["kept", "tiny", "third", "fourth"], on_progress=no_progress
    ) as watch:
        watch.progress("kept", "search", 0.0, "")  # all its trials are of an earlier run
        watch.progress("kept", "done", 1.0, "")
        assert watch.state().seconds_left is None
        watch.progress("tiny", "search", 0.0, "")
        study = make_study(tiny_task, tmp_path)
        end_trial(study, study.next_trial(), 0.5, 1.0)
        watch.study(study, samples=1, fit_samples=1)
        assert watch.state().seconds_left is None
        now[0] = 1060.0
        watch.progress("tiny", "done", 1.0, "")
        assert watch.state().seconds_left == 120.0


def test_a_batch_is_named_by_its_job_or_by_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch_name().startswith("run-20")
    monkeypatch.setenv(BATCH_VARIABLE, "../friday.2")
    assert batch_name() == ".._friday.2"


# --- what is shown --------------------------------------------------------------------------------


def test_only_a_state_is_read_as_one(tmp_path: Path) -> None:
    state = BatchState(
        batch="b",
        started=1.0,
        written=2.0,
        is_over=False,
        seconds_left=None,
        tasks=(TaskState(task="a"),),
    )
    newer = {**state.as_json(), "colour": "red", "tasks": [{"task": "a", "mood": "good"}]}
    assert parse_state(json.loads(json.dumps(newer))) == state
    assert [
        parse_state(content)
        for content in (None, [], {}, {"tasks": [1]}, {"tasks": [{}]}, {"tasks": []}, "x")
    ] == [None] * 7
    answer = taskpack("status", "--workdir", tmp_path)
    assert (answer.code, answer.out) == (9, "")
    assert "has no state of a run" in answer.words
    assert taskpack("status", "friday", "--workdir", tmp_path).code == 2


def test_what_cannot_be_known_is_blank() -> None:
    tasks = (
        TaskState(
            task="a",
            stage="search",
            trials_done=3,
            trials=8,
            val_metric=0.9512,
            size_bytes=2048,
            seconds_left=61.0,
        ),
        TaskState(task="b"),
        TaskState(task="c", stage="done"),
    )
    state = BatchState(
        batch="friday.1", started=0.0, written=0.0, is_over=False, seconds_left=7200.0, tasks=tasks
    )
    table = state_table(state, is_running=True)
    cells = [list(column.cells) for column in table.columns]
    assert [row[0] for row in cells] == ["a", "search", "3/8", "95.1", "2.0 KiB", "1 min"]
    assert [row[1] for row in cells] == ["b", "waiting", "", "", "", ""]
    assert list(state_table(state, is_running=False).columns[-1].cells) == ["", "", ""]
    fast = replace(tasks[0], images_per_second=2190.4, gpu_busy=0.87, gpu_memory_bytes=10**10)
    silent = replace(tasks[1], gpu_memory_bytes=2**30)
    table = state_table(replace(state, tasks=(fast, silent, tasks[2])), is_running=True)
    assert list(table.columns[5].cells) == ["2190", "", ""]
    assert list(table.columns[6].cells) == ["87% 9.3 GiB", "1.0 GiB", ""]
    said = "friday.1: 3 tasks, 1 done, 1 at work, 1 waiting"
    assert summary(state, is_running=True, age_seconds=5.0) == f"{said}; about 2.0 h left"
    assert summary(state, is_running=True, age_seconds=600.0).startswith(
        f"{said}; last update 10 min ago"
    )
    assert (
        summary(state, is_running=False)
        == f"{said}; the run ended early; run the same command to continue"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, "0 s"), (59.4, "59 s"), (60, "1 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_durations_have_one_unit(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
