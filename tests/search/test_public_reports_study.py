"""Trials and workers that people report to have failed: what was a crash or a silent change is one
line."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers_cli import taskpack_process, write_task

from pipeline import errors
from pipeline.cluster.rank_group import TrialResources
from pipeline.driver import compare as compare_module
from pipeline.driver import stages as stages_module
from pipeline.errors import (
    ClusterError,
    OutOfMemory,
    TaskpackError,
    TrainingError,
    UnexpectedError,
    WorkerDied,
)
from pipeline.search import run_study as study_module
from pipeline.search.champion import choose_champion
from pipeline.search.proposer import make_proposer
from pipeline.search.run_study import run_study
from pipeline.search.study import Study
from pipeline.search.trial_record import TrialJournal, failure_warnings
from pipeline.selection import stage as selection_stage
from pipeline.specs import (
    Connections,
    Recipe,
    SearchSpace,
    Task,
    Training,
)
from pipeline.training import Inputs
from pipeline.utils.files import explained

ALONE_ON_CPU = TrialResources()

# --- what fails in a worker -----------------------------------------------------------------------


def worker_arguments(inputs: Inputs, recipe: Recipe) -> tuple[str, str, str, None]:
    """What a worker is sent for a trial or fit of `recipe`, without a selection."""
    return inputs.task.model_dump_json(), recipe.model_dump_json(), str(inputs.data_folder), None


def outcomes_of_workers(
    inputs: Inputs, recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[TaskpackError]:
    """How a trial of a study, a trial of a comparison and a fit say that `recipe` fails."""
    sent = worker_arguments(inputs, recipe)
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", reports.append)
    config = dict(zip(("task", "recipe", "data_folder", "selection"), sent, strict=True))
    kept = folder / "kept.safetensors"
    study_module._trainable({**config, "kept": str(kept), "resources": ALONE_ON_CPU})
    (report,) = reports
    fault = getattr(errors, report["error"])(report["message"])
    vars(fault).update({"details": report["details"]} if report["details"] else {})
    return [
        fault,
        compare_module._trial_worker(*sent, kept, ALONE_ON_CPU),
        stages_module.fit_worker(*sent, folder, ALONE_ON_CPU),
    ]  # type: ignore[list-item]


def test_an_exception_in_a_worker_is_told_as_a_value_with_its_traceback(
    tiny_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fault in outcomes_of_workers(
        tiny_inputs, Recipe(connections=Connections()), tmp_path, monkeypatch
    ):
        assert isinstance(fault, UnexpectedError)
        assert str(fault) == "AssertionError: a recipe with connections needs a selection"
        assert "in _attach_parts" in fault.details
        assert pickle.loads(pickle.dumps(fault)).details == fault.details


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError("Unable to allocate 8 GiB for an array"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate"
            " memory: you tried to allocate 8 bytes."
        ),
    ],
)
def test_memory_that_ends_is_named_with_what_is_free(
    error: Exception, tiny_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("pipeline.training.loop._step", no_memory)
    recipe = Recipe(training=Training(epochs=2, batch_size=48, precision="fp32"))
    for fault in outcomes_of_workers(tiny_inputs, recipe, tmp_path, monkeypatch):
        assert isinstance(fault, OutOfMemory)
        assert re.fullmatch(
            r"out of memory with one image at a time: [0-9.]+ of [0-9.]+ GiB are free on the CPU;"
            r" lower input\.size_px, or use a device with more memory",
            str(fault),
        )


def test_other_errors_of_torch_are_not_called_out_of_memory(
    tiny_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("expected scalar type BFloat16 but found Float")

    monkeypatch.setattr("pipeline.training.loop._step", mistake)
    for fault in outcomes_of_workers(tiny_inputs, Recipe(), tmp_path, monkeypatch):
        assert isinstance(fault, UnexpectedError)
        assert str(fault) == "RuntimeError: expected scalar type BFloat16 but found Float"


def test_a_selection_that_fails_in_its_worker_tells_of_it_as_a_value(
    tiny_inputs: Inputs, tmp_path: Path
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        config = {
            "task": tiny_inputs.task.model_dump_json(),
            "data_folder": str(tiny_inputs.data_folder),
            "path": str(tmp_path / "s"),
            "use_gpu": False,
            "cpus": 1,
        }
        fault = selection_stage._worker({**config, "top_k": -1})
    finally:
        dist.destroy_process_group()
    assert isinstance(fault, UnexpectedError)
    assert "in _ranked" in fault.details


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("local_ray")
def test_a_trial_that_raises_is_run_once_and_the_others_go_on(
    tiny_task: Task,
    tiny_data: Path,
    tiny_inputs: Inputs,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A recipe with connections and no selection breaks an invariant of the code; the one without
    connections is sound.
    """
    task = tiny_task.changed(search=SearchSpace(top_k=(0, 2)))
    journal = TrialJournal(tmp_path / "trials", tmp_path / "logs" / "tiny.txt")
    sizes = {"size_of": lambda recipe: 100 + bool(recipe.connections)}
    records = run_study(task, tiny_data, None, journal, **sizes)  # type: ignore[arg-type]
    assert [record.state for record in records] == ["complete", "failed"]
    assert list(journal.read()) == [records[0].id], (
        "a mistake in the code may be corrected: run the same command to try it again"
    )
    log = tmp_path / "logs" / "tiny.txt"
    assert failure_warnings(records) == [
        "1 of 2 trials failed: AssertionError: a recipe with connections needs a selection;"
        f" details in {log}; run the same command to try it again"
    ]
    assert log.read_text().count("Traceback (most recent call last)") == 1
    assert choose_champion(records, task, journal.outcomes) == [records[0]]
    assert "Traceback" not in "".join(capfd.readouterr())
    alone = task.changed(search=SearchSpace(top_k=(2,)))
    with pytest.raises(
        ClusterError,
        match=(
            "tiny: no trial completed; 1 of 1 trials failed: AssertionError: a recipe with"
            " connections"
        ),
    ):
        run_study(alone, tiny_data, None, journal, **sizes)  # type: ignore[arg-type]


def test_each_kind_of_failure_is_kept_and_told_as_what_it_is(
    tiny_task: Task, tmp_path: Path
) -> None:
    task = tiny_task.changed(search=SearchSpace(learning_rate=(1e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3)))
    journal = TrialJournal(tmp_path / "trials", tmp_path / "log")
    study = Study(task, make_proposer(task, lambda recipe: 1), journal)
    diverged, memory, died = (
        TrainingError("the loss became nan"),
        OutOfMemory("out of memory: 0.1 GiB are free"),
        WorkerDied("its worker died"),
    )
    for fault in (diverged, memory, memory, died, UnexpectedError("KeyError: 'a'", "Traceback")):
        number = study.next_trial()
        assert number is not None
        study.finish(number, 1.0, fault)
    kept = journal.read().values()
    assert sorted(record.error for record in kept) == [
        "OutOfMemory",
        "OutOfMemory",
        "TrainingError",
    ]
    first = next(record for record in study.all_records() if record.error == "OutOfMemory")
    assert failure_warnings(study.all_records()) == [
        "1 of 5 trials failed: the loss became nan",
        (
            "2 of 5 trials failed, the first: out of memory: 0.1 GiB are free. To try this trial"
            f" again with more memory, remove {tmp_path / 'trials' / first.id}.json"
        ),
        "1 of 5 trials failed: its worker died; run the same command to try it again",
        (
            f"1 of 5 trials failed: KeyError: 'a'; details in {tmp_path / 'log'}; run the same"
            " command to try it again"
        ),
    ]
    (tmp_path / "trials" / f"{first.id}.json").unlink()
    assert len(journal.read()) == 2


def test_the_log_of_a_task_does_not_grow_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.utils.files.LOG_BYTES", 1000)
    for number in range(100):
        explained(UnexpectedError(f"number {number}", "x" * 100), tmp_path / "log", "the task")
    assert (tmp_path / "log").stat().st_size < 1400
    assert "number 99" in (tmp_path / "log").read_text()


# --- a private Ray --------------------------------------------------------------------------------


def test_a_temporary_folder_too_deep_for_rays_sockets_is_named_before_ray_starts(
    tmp_path: Path,
) -> None:
    deep = tmp_path / ("a" * 100)
    deep.mkdir()
    answer = taskpack_process(
        "run", write_task(tmp_path), "--workdir", tmp_path / "work", TMPDIR=str(deep)
    )
    assert answer.code == 7
    assert "set a shorter TMPDIR" in answer.words
    assert str(deep) in answer.words.replace(" ", "")
    assert "Traceback" not in answer.err
    assert "validate_socket" not in answer.err
