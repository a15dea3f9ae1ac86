"""Search spaces and settings that people report to have gone wrong, each read as meant or
refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_cases import for_every
from helpers_cli import TASK, new_workdir, write_task

from pipeline.adaptation.tensors import PlannedTensor, initial_values
from pipeline.data import Reader
from pipeline.driver.batch import run_batch
from pipeline.driver.compare import compare_methods
from pipeline.driver.plan_report import plan_task
from pipeline.errors import (
    BackboneError,
    SpecError,
)
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

BACKBONE = Backbone(model="vit_tiny_patch16_224", weights="random")
SHORT = {"epochs": 2, "batch_size": 16, "precision": "fp32"}

# --- search spaces --------------------------------------------------------------------------------


@for_every(
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


# --- the same selection, whoever makes it ---------------------------------------------------------


def test_plan_and_run_select_with_one_thread_decode_with_all_and_write_the_same_file(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, decoders = list[int](), list[int]()
    sums, batches = selection_stage.gradient_sums, Reader.batches

    def noted(*arguments: Any, **options: Any) -> Any:
        threads.append(torch.get_num_threads())
        return sums(*arguments, **options)

    def read(reader: Reader, plan: Any) -> Any:
        decoders.append(reader._decoders)
        return batches(reader, plan)

    monkeypatch.setattr(selection_stage, "gradient_sums", noted)
    monkeypatch.setattr(Reader, "batches", read)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        plan_task(tiny_task, tmp_path)
        inputs = open_inputs(tiny_task, tmp_path / "data" / tiny_task.name)
        assert selection_stage.select_locally_if_faster(inputs, 3, tmp_path / "run", workers=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1]
    assert decoders == [2, 2]
    (planned,) = tmp_path.glob("selections/*.safetensors")
    assert planned.read_bytes() == (tmp_path / "run").read_bytes()


def test_a_plan_says_what_would_fit_where_nothing_does(tiny_task: Task, tmp_path: Path) -> None:
    over = tiny_task.changed(budget={"max_bytes": 100})
    (remark,) = plan_task(over, tmp_path, select=False).remarks
    assert "nothing in the search space fits the budget of 100 bytes; the smallest pack" in remark


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
    (recipe,) = space.fullest(Recipe(biases=Biases(), full=None, norms=Norms()))
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


@for_every(
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
