"""Search spaces, trials and settings that people report to have gone wrong: what was a crash, a
wrong word or a silent loss is named in one line.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from helpers_cli import TASK, new_workdir, taskpack_process, write_task

from pipeline import errors
from pipeline.adaptation.tensors import PlannedTensor, initial_values
from pipeline.cluster.rank_group import TrialResources
from pipeline.driver import compare as compare_module
from pipeline.driver import stages as stages_module
from pipeline.driver.batch import run_batch
from pipeline.driver.compare import compare_methods
from pipeline.driver.plan_report import plan_task
from pipeline.errors import (
    BackboneError,
    ClusterError,
    OutOfMemory,
    SpecError,
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
    Adapter,
    Backbone,
    Biases,
    Bits,
    ClassToken,
    Connections,
    Full,
    Lora,
    Method,
    Norms,
    Prompts,
    Recipe,
    SearchSpace,
    ShardsData,
    Smoa,
    Ssf,
    Task,
    Training,
)
from pipeline.specs.catalogue import tasks_to_compare
from pipeline.specs.paths import DATA_ROOT
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, open_inputs, rehearsal
from pipeline.training.rehearsal import rehearse
from pipeline.utils.files import explained

ALONE_ON_CPU = TrialResources()
BACKBONE = Backbone(model="vit_tiny_patch16_224", weights="random")
SHORT = {"epochs": 2, "batch_size": 16, "precision": "fp32"}


# --- search spaces --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "search", "message"),
    [
        (
            {"connections": {}, "head": {"bits": 32}, "quantiser": {"codebook": "lloyd_max"}},
            {"bits": [8, 32]},
            "at bits 32: quantiser would change nothing: no part has fewer than 16 bits",
        ),
        (
            {"full": {}},
            {"top_k": [0, 1]},
            "at top_k 1: full trains everything that connections would change",
        ),
        (
            {"full": {}},
            {"experts": [0, 4]},
            "at experts 4: full trains everything that smoa would change",
        ),
        (
            {"adapter": {}},
            {"experts": [0, 4], "bits": [1]},
            "at bits 1, experts 4: smoa and adapter are both in parallel to the MLP",
        ),
        (
            {"smoa": {"top_k": 2}},
            {"experts": [1, 4]},
            "at experts 1: given 2 experts a sub-token (top_k) of a bank of 1",
        ),
        (
            {"biases": {"bits": 16}, "head": {"bits": 16}, "connections": {}, "quantiser": {}},
            {"top_k": [0, 1]},
            "at top_k 0: quantiser would",
        ),
        (
            {"lora": {}, "head": {"bits": 32}, "quantiser": {}},
            {"adapter_bits": [4, 16]},
            "at adapter_bits 16: quantiser would change nothing",
        ),
        (
            {"connections": None, "quantiser": {}},
            {"head_bits": [8, 32]},
            "at head_bits 32: quantiser would change nothing",
        ),
    ],
)
def test_a_space_with_an_impossible_point_is_refused_when_the_task_is_read(
    tmp_path: Path, recipe: dict[str, Any], search: dict[str, Any], message: str
) -> None:
    path = write_task(tmp_path, recipe={**recipe, "training": SHORT}, search=search)
    with pytest.raises(SpecError) as caught:
        load_task(path)
    assert str(caught.value).startswith(f"{path}: search: given ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_method_with_an_impossible_point_is_refused() -> None:
    with pytest.raises(ValueError, match="at top_k 1: full trains everything"):
        Method.model_validate({"recipe": {"full": {}}, "search": {"top_k": [0, 1]}})


# --- training settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "warmup"), [(5, 10), (5, 5), (1, 1)])
def test_a_warm_up_that_takes_all_epochs_is_refused(
    tmp_path: Path, epochs: int, warmup: int
) -> None:
    path = write_task(
        tmp_path,
        recipe={"connections": {}, "training": {"epochs": epochs, "warmup_epochs": warmup}},
        search={},
    )
    with pytest.raises(
        SpecError,
        match=(
            rf"training.warmup_epochs is {warmup} and training.epochs is {epochs}; the learning"
            r" rate would only rise"
        ),
    ):
        load_task(path)


def test_a_short_run_warms_up_for_half_of_it() -> None:
    assert [Training(epochs=epochs).warmup_epochs for epochs in (1, 2, 12)] == [0.5, 1.0, 1.0]


def test_fewer_epochs_of_a_comparison_have_as_large_a_share_of_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(DATA_ROOT, "/data")
    _, tasks = tasks_to_compare([], "vtab1k", 5)
    assert {
        (task.recipe.training.epochs, task.recipe.training.warmup_epochs) for task in tasks
    } == {(5, 0.5)}
    method = Method(recipe=Recipe(), search=SearchSpace())
    assert method.on(tasks[0]).recipe.training.warmup_epochs == 0.5


def test_a_methods_warm_up_must_end_within_the_tasks_epochs(tmp_path: Path) -> None:
    task = load_task(
        write_task(tmp_path, recipe={"connections": {}, "training": {"epochs": 5}}, search={})
    )
    method = Method(
        recipe=Recipe(training=Training(warmup_epochs=10)), search=SearchSpace(head_bits=(1, 2))
    )
    with pytest.raises(
        SpecError,
        match=r"slow: on the task bars: training\.warmup_epochs is 10 and training\.epochs is 5",
    ):
        compare_methods([task], {"slow": method}, tmp_path / "work")


@pytest.mark.parametrize("bits", [1, 4])
def test_the_second_matrix_of_an_adapter_starts_as_a_normal_that_is_cut_at_two_deviations(
    bits: Bits,
) -> None:
    """torch takes the bounds as values: without them nothing is cut, and the deviation is 1e-3
    instead of 0.88e-3.
    """
    up = initial_values(
        PlannedTensor("adapters", "up", (200, 300), bits, start="up"),
        torch.Generator().manual_seed(0),
    )
    assert 1.9e-3 < up.abs().max() <= 2e-3
    assert float(up.std()) == pytest.approx(0.8796e-3, rel=0.01)


# --- from Python ----------------------------------------------------------------------------------


def test_data_without_a_format_is_shards_from_python_too(tmp_path: Path) -> None:
    data = {"train": "train.tar", "test": "test.tar"}
    task = Task.model_validate({"name": "python", "data": data, "backbone": BACKBONE})
    assert task.data == ShardsData(**data)
    (tmp_path / "task.yaml").write_text(
        yaml.safe_dump({**TASK, "data": data, "backbone": BACKBONE.model_dump()})
    )
    assert load_task(tmp_path / "task.yaml").data == ShardsData(
        train=str(tmp_path / "train.tar"), test=str(tmp_path / "test.tar")
    )
    assert Task(name="python", data=data, backbone=BACKBONE).data == task.data  # type: ignore[arg-type]


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
def test_memory_that_ends_is_named_with_batch_model_and_what_is_free(
    error: Exception, tiny_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("pipeline.training.loop._step", no_memory)
    recipe = Recipe(training=Training(epochs=2, batch_size=48, precision="fp32"))
    for fault in outcomes_of_workers(tiny_inputs, recipe, tmp_path, monkeypatch):
        assert isinstance(fault, OutOfMemory)
        assert re.fullmatch(
            r"out of memory with batches of 48 images of 32 px in vit_tiny_patch16_224: [0-9.]+ of"
            r" [0-9.]+ GiB are free on the CPU; "
            r"lower training\.batch_size, or use a device with more memory",
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
    assert choose_champion(records, task.budget) is records[0]
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
        slot = study.next_slot()
        assert slot is not None
        study.finish(slot, 1.0, fault)
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


# --- the same selection, whoever makes it ---------------------------------------------------------


def test_plan_and_run_select_with_one_thread_and_write_the_same_file(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    sums = selection_stage.gradient_sums

    def noted(*arguments: Any, **options: Any) -> Any:
        threads.append(torch.get_num_threads())
        return sums(*arguments, **options)

    monkeypatch.setattr(selection_stage, "gradient_sums", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        plan_task(tiny_task, tmp_path)
        inputs = open_inputs(tiny_task, tmp_path / "data" / tiny_task.name)
        assert selection_stage.select_if_sooner(inputs, 3, tmp_path / "run", workers=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1]
    (planned,) = tmp_path.glob("selections/*.safetensors")
    assert planned.read_bytes() == (tmp_path / "run").read_bytes()


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


# --- a part that does not run on a backbone -------------------------------------------------------


def test_a_step_and_a_pack_are_tried_once_before_a_study(
    tiny_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Recipe] = []
    attach = rehearsal.attach
    monkeypatch.setattr(rehearsal, "_rehearsed", set())

    def noted(backbone: Any, recipe: Recipe, *given: Any, **options: Any) -> Any:
        tried.append(recipe)
        return attach(backbone, recipe, *given, **options)

    monkeypatch.setattr(rehearsal, "attach", noted)
    space = SearchSpace(top_k=(0, 3), experts=(0, 2), bits=(8, 1), learning_rate=(1e-3, 1e-2))
    recipe = space.fullest(Recipe(biases=Biases(), full=None, norms=Norms()))
    assert recipe.connections == Connections(top_k=3, bits=1)
    assert recipe.smoa == Smoa(experts=2, bits=1)
    for _ in range(2):
        rehearse(tiny_inputs, recipe)
    rehearse(tiny_inputs, recipe.changed(training=Training(learning_rate=1.0)))
    assert tried == [recipe]
    for other in (
        Recipe(full=Full()),
        Recipe(prompts=Prompts(), class_token=ClassToken(), ssf=Ssf()),
        Recipe(lora=Lora(), adapter=Adapter()),
        Recipe(),
    ):
        rehearse(tiny_inputs, other)


@pytest.mark.parametrize(
    "selection",
    [
        {},
        {"level": "network"},
        {"criterion": "magnitude"},
        {"criterion": "random", "level": "layer"},
    ],
)
def test_the_selection_makes_no_difference_to_the_step(
    tiny_inputs: Inputs, selection: dict[str, Any]
) -> None:
    task = tiny_inputs.task.changed(selection=selection)
    rehearse(
        dataclasses.replace(tiny_inputs, task=task),
        Recipe(connections=Connections(top_k=2, bits=3)),
    )


def broken(message: str) -> Any:
    def forward(*arguments: Any, **options: Any) -> Any:
        raise TypeError(f"{message}\nsecond line")

    return forward


def test_a_part_that_finds_its_place_and_does_not_run_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Before any worker starts, by `plan` and by `run`; a comparison says it of the methods that
    have the part.
    """
    monkeypatch.setattr(
        "pipeline.adaptation.parts.smoa.ParallelToMlp.forward",
        broken("takes 2 positional arguments but 3 were given"),
    )
    said = (
        "recipe.smoa: cannot run on vit_tiny_patch16_224 (TypeError: takes 2 positional arguments"
        " but 3 were given); leave it out"
    )
    task = load_task(
        write_task(
            tmp_path,
            recipe={"connections": {}, "biases": {}, "training": SHORT},
            search={"experts": [0, 2]},
        )
    )
    with pytest.raises(BackboneError, match=re.escape(said)):
        plan_task(task, tmp_path / "plan")
    (outcome,) = run_batch([task], new_workdir(tmp_path_factory.getbasetemp(), tmp_path))
    assert isinstance(outcome.error, BackboneError)
    assert str(outcome.error).startswith(said)
    assert outcome.stage == "prepare"
    methods = {"banks": Method(recipe=Recipe(smoa=Smoa()), search=SearchSpace(width=(4, 8)))}
    (row,) = compare_methods([task], methods, tmp_path / "compared")
    assert row.error.startswith(said)


def test_parts_that_fail_together_alone_are_named_together(
    tiny_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = rehearsal.attach

    def attach_one(backbone: Any, recipe: Recipe, *given: Any, **options: Any) -> Any:
        assert not (recipe.biases and recipe.norms), "one of both"
        return attach(backbone, recipe, *given, **options)

    monkeypatch.setattr(rehearsal, "_rehearsed", set())
    monkeypatch.setattr(rehearsal, "attach", attach_one)
    with pytest.raises(
        BackboneError,
        match=(
            r"recipe: biases with norms: cannot run on vit_tiny_patch16_224 \(AssertionError: one"
            r" of both"
        ),
    ):
        rehearse(tiny_inputs, Recipe(biases=Biases(), norms=Norms()))


def test_a_pack_that_computes_something_else_is_noticed(
    tiny_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_rehearsed", set())
    pack = rehearsal.to_pack
    monkeypatch.setattr(
        rehearsal,
        "to_pack",
        lambda *given: dataclasses.replace(
            pack(*given), probe_logits=pack(*given).probe_logits + 1
        ),
    )
    with pytest.raises(
        BackboneError,
        match=(
            r"recipe\.norms: cannot run on .* \(PackDamaged: the reloaded model's probe logits"
            r" differ"
        ),
    ):
        rehearse(tiny_inputs, Recipe(norms=Norms()))
