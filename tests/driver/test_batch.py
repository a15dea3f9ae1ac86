"""A batch: one task's failure never stops the others, the same seed gives the same bytes,
unforeseen errors are kept.
"""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import pytest
from helpers_cli import (
    TASK,
    Answer,
    FinishedRun,
    finished_run,
    new_workdir,
    taskpack,
    write_task,
)

from pipeline.cluster.rank_group import WORKER_DIED
from pipeline.driver.batch import TaskOutcome, flatten, run_batch
from pipeline.driver.stages import named_errors
from pipeline.errors import ClusterError, DataError, StorageError
from pipeline.registry.store import open_registry
from pipeline.search.trial_record import TrialRecord
from pipeline.specs.task_files import load_task
from pipeline.utils.files import await_file

# Ray's own processes and files are closed by Ray, some of them late.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def finished(base: Path) -> FinishedRun:
    return finished_run(base)


@pytest.fixture(scope="module")
def batch(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """The work folder after a run of three tasks, the second of which cannot be prepared, and what
    the run said.
    """
    folder = tmp_path_factory.mktemp("batch")
    tasks = folder / "tasks"
    write_task(tasks, name="bars")
    write_task(tasks, name="broken", data={"train": "none.tar", "test": "none.tar"})
    linear = {"connections": None, "training": {"epochs": 1, "batch_size": 16, "precision": "fp32"}}
    write_task(
        tasks,
        name="dots",
        data={**TASK["data"], "kind": "counting"},
        recipe=linear,
        search={"head_bits": [4, 8]},
    )
    workdir = new_workdir(base, folder)
    return workdir, taskpack("run", tasks, "--workdir", workdir)


# --- one of three fails ---------------------------------------------------------------------------


def test_the_other_tasks_are_registered(batch: tuple[Path, Answer]) -> None:
    workdir, answer = batch
    packs = taskpack("ls", "--workdir", workdir, "--json").json()
    assert sorted(pack["name"] for pack in packs) == ["bars", "dots"]
    champions = answer.out[answer.out.index("Champions") :]
    assert [line.split()[0] for line in champions.splitlines()[2:4]] == ["bars", "dots"]


def test_the_summary_and_the_exit_code_tell_of_the_failure(batch: tuple[Path, Answer]) -> None:
    _, answer = batch
    assert answer.code == 3
    failure, summary, advice = answer.err.splitlines()
    assert failure.startswith("broken failed in prepare: ")
    assert "none.tar: no such shard" in failure
    assert summary == "2 of 3 tasks registered, 1 failed"
    assert advice.startswith("run the same command to try the failed tasks again")


def test_the_failure_shows_before_any_task_is_searched(batch: tuple[Path, Answer]) -> None:
    lines = [line.partition("] ")[2] for line in batch[1].out.splitlines() if line.startswith("[")]
    stages = [line.partition(" - ")[0] for line in lines]
    assert stages.index("broken: failed") < stages.index("bars: select")
    assert {"bars: done", "dots: done"} <= set(stages)


def test_a_task_without_connections_needs_no_selection(batch: tuple[Path, Answer]) -> None:
    assert "dots: select" not in batch[1].out
    assert "dots: search" in batch[1].out


def test_the_same_seed_gives_the_same_bytes(
    batch: tuple[Path, Answer], finished: FinishedRun
) -> None:
    """One run of its own and one among others, in different folders."""
    (selection,) = batch[0].glob("selections/*.safetensors")
    (pack,) = batch[0].glob("studies/bars-*/fits/*/pack.safetensors")
    assert (selection.name, selection.read_bytes()) == (
        finished.selection.name,
        finished.selection.read_bytes(),
    )
    assert pack.read_bytes() == finished.pack.read_bytes()


def test_the_log_tells_every_stage_and_trial(batch: tuple[Path, Answer]) -> None:
    workdir, _ = batch
    events = [
        json.loads(line) for line in (workdir / "logs" / "batch.jsonl").read_text().splitlines()
    ]
    assert [event["event"] for event in events if "task" not in event] == ["started", "ended"]
    assert (events[-1]["tasks"], events[-1]["done"], events[-1]["failed"]) == (3, 2, 1)
    stages = [
        event["stage"] for event in events if event["event"] == "stage" and event["task"] == "bars"
    ]
    assert stages == ["prepare", "waiting", "select", "search", "fit", "register", "done"]
    trials = {event["trial"]: event for event in events if event["event"] == "trial"}
    journal = {
        path.stem: json.loads(path.read_text()) for path in workdir.glob("studies/*/trials/*.json")
    }
    assert {name: trial["size_bytes"] for name, trial in trials.items()} == {
        name: record["size_bytes"] for name, record in journal.items()
    }
    assert all(trial["images_per_second"] > 0 for trial in trials.values())
    assert all(0 <= trial["waiting"] <= 1 for trial in trials.values())
    (registered,) = [
        event for event in events if event["event"] == "registered" and event["task"] == "dots"
    ]
    (pack,) = workdir.glob(f"studies/dots-*/fits/{registered['trial']}/pack.safetensors")
    assert registered["size_bytes"] == pack.stat().st_size
    (failure,) = [event for event in events if event.get("stage") == "failed"]
    assert (failure["task"], failure["after"]) == ("broken", "prepare")
    assert "no such shard" in failure["remark"]


def test_status_tells_where_the_tasks_of_a_work_folder_stand(batch: tuple[Path, Answer]) -> None:
    workdir, _ = batch
    told = taskpack("status", "--workdir", workdir, "--json").json()
    champions = {
        pack["name"]: (pack["metrics"]["val_metric"], pack["size_bytes"])
        for pack in taskpack("ls", "--workdir", workdir, "--json").json()
    }
    best = {task["task"]: (task["val_metric"], task["size_bytes"]) for task in told["tasks"]}
    assert best == {**champions, "broken": (None, None)}
    assert [task["stage"] for task in told["tasks"]] == ["done", "failed", "done"]
    shown = taskpack("status", "--workdir", workdir)
    assert all(task["images_per_second"] > 0 for task in told["tasks"] if task["stage"] == "done")
    assert "3 tasks, 2 done, 1 failed; the run is over" in shown.words
    assert "broken: " in shown.err


def test_each_trials_run_in_the_registry_has_its_speed(batch: tuple[Path, Answer]) -> None:
    workdir, _ = batch
    events = map(json.loads, (workdir / "logs" / "batch.jsonl").read_text().splitlines())
    trials = [event for event in events if event["event"] == "trial"]
    speeds = {trial["trial"]: trial["images_per_second"] for trial in trials}
    store = open_registry(None, workdir)
    runs = store.client.search_runs([store.store.experiment_id], "tags.trial_id != ''")
    assert speeds == {
        run.data.tags["trial_id"]: run.data.metrics["images_per_second"] for run in runs
    }


# --- without Ray ----------------------------------------------------------------------------------


def test_an_unforeseen_error_ends_its_task_alone_and_is_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("a mistake of ours\nsecond line")

    monkeypatch.setattr("pipeline.driver.stages.prepare", fail)
    workdir = new_workdir(base, tmp_path)
    outcomes = run_batch(
        [load_task(write_task(tmp_path, name=name)) for name in ("one", "two")], workdir
    )
    assert [(outcome.task, outcome.stage, type(outcome.error)) for outcome in outcomes] == [
        (n, "prepare", ClusterError) for n in ("one", "two")
    ]
    log = workdir / "logs" / "one.txt"
    assert str(outcomes[0].error).startswith(
        f"unexpected ZeroDivisionError: a mistake of ours; details in {log}"
    )
    assert "second line" in log.read_text()


def test_data_that_does_not_come_holds_up_no_other_task_s(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_read = threading.Barrier(2)

    def read(*arguments: object) -> None:
        both_read.wait(timeout=60)
        raise DataError("no answer")

    monkeypatch.setattr("pipeline.driver.stages.prepare", read)
    outcomes = run_batch(
        [load_task(write_task(tmp_path, name=name)) for name in ("one", "two")],
        new_workdir(base, tmp_path),
    )
    assert [str(outcome.error) for outcome in outcomes] == ["no answer"] * 2


def test_a_full_disk_is_named_wherever_it_was_met(tmp_path: Path) -> None:
    """In this process, in a worker, and in the library that writes tensors."""
    from ray.exceptions import RayTaskError
    from safetensors import SafetensorError

    full = OSError(errno.ENOSPC, "No space left on device", "/mnt/runs/a")
    of_worker = RayTaskError("fit", "traceback", full).as_instanceof_cause()
    for error in (
        full,
        of_worker,
        SafetensorError('IoError(Os { code: 28, message: "No space left on device" })'),
    ):
        with (
            pytest.raises(
                StorageError,
                match=r"(?i)no space left on device; free space, or choose another --workdir",
            ),
            named_errors(tmp_path / "log"),
        ):
            raise error
    assert not (tmp_path / "log").exists()


def test_a_result_that_a_worker_wrote_elsewhere_is_not_waited_for_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.utils.files.SEEN_SECONDS", 0.1)
    with pytest.raises(StorageError, match="--workdir must be a folder that every node shares"):
        await_file(tmp_path / "pack")
    threading.Timer(0.3, (tmp_path / "pack").touch).start()
    monkeypatch.setattr("pipeline.utils.files.SEEN_SECONDS", 30)
    await_file(tmp_path / "pack")


def test_a_lost_trial_and_an_odd_champion_are_told() -> None:
    kept = TrialRecord(
        id="a",
        point={},
        size_bytes=1,
        state="complete",
        val_metric=0.5,
        curve=(0.5,),
        message="an expert was never used",
    )
    lost = TrialRecord(
        id="b", point={}, size_bytes=1, state="failed", message=WORKER_DIED, error="WorkerDied"
    )
    outcome = TaskOutcome(task="t", trials=(kept, lost), champion_id="a")
    assert outcome.warnings() == [
        "an expert was never used",
        f"1 of 2 trials failed: {WORKER_DIED}; run the same command to try it again",
    ]


def test_progress_tells_each_task_s_stages_in_order(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    tasks = [
        load_task(write_task(tmp_path, name=name, budget={"max_bytes": 1000}))
        for name in ("one", "two")
    ]
    run_batch(
        tasks,
        new_workdir(base, tmp_path),
        on_progress=lambda task, stage, share, remark: seen.append((task, stage)),
    )
    assert [[stage for name, stage in seen if name == task] for task in ("one", "two")] == [
        ["prepare", "failed"]
    ] * 2


def test_two_runs_do_not_share_a_work_folder(base: Path, tmp_path: Path) -> None:
    from pipeline.utils.files import exclusive

    workdir, task = new_workdir(base, tmp_path), write_task(tmp_path)
    with exclusive(workdir):
        answer = taskpack("run", task, "--workdir", workdir)
    assert answer.code == 9
    assert "another taskpack run is using this folder" in answer.words


def test_flatten_names_each_value_by_its_path() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": "x"}}, "e": None}) == {
        "a.b": "1",
        "a.c.d": "x",
        "e": "None",
    }
