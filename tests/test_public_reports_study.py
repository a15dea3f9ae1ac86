"""Search spaces, trials and settings that people report to have gone wrong: what was a crash, a wrong word or a silent loss is named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_cli import TASK, write_task

from pipeline.compare import compare_methods
from pipeline.errors import SpecError
from pipeline.spec import Backbone, Method, Recipe, SearchSpace, ShardsData, Task, Training
from pipeline.task_files import DATA_ROOT, load_task, tasks_to_compare

BACKBONE = Backbone(model="vit_tiny_patch16_224", weights="random")
SHORT = {"epochs": 2, "batch_size": 16, "precision": "fp32"}


# --- search spaces --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "search", "message"),
    [
        (
            {"connections": {}, "head": {"bits": 32}, "quantiser": {"codebook": "lloyd_max"}},
            {"bits": [8, 32]},
            "at bits 32: quantiser would change nothing: no part has fewer than 16 bits",
        ),
        ({"full": {}}, {"top_k": [0, 1]}, "at top_k 1: full trains everything that connections would change"),
        ({"full": {}}, {"experts": [0, 4]}, "at experts 4: full trains everything that smoa would change"),
        ({"adapter": {}}, {"experts": [0, 4], "bits": [1]}, "at bits 1, experts 4: smoa and adapter are both in parallel to the MLP"),
        ({"smoa": {"top_k": 2}}, {"experts": [1, 4]}, "at experts 1: given 2 experts a sub-token (top_k) of a bank of 1"),
        ({"biases": {"bits": 16}, "head": {"bits": 16}, "connections": {}, "quantiser": {}}, {"top_k": [0, 1]}, "at top_k 0: quantiser would"),
        ({"lora": {}, "head": {"bits": 32}, "quantiser": {}}, {"adapter_bits": [4, 16]}, "at adapter_bits 16: quantiser would change nothing"),
        ({"connections": None, "quantiser": {}}, {"head_bits": [8, 32]}, "at head_bits 32: quantiser would change nothing"),
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


# --- training settings ----------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "warmup"), [(5, 10), (5, 5), (1, 1)])
def test_a_warm_up_that_takes_all_epochs_is_refused(tmp_path: Path, epochs: int, warmup: int) -> None:
    path = write_task(tmp_path, recipe={"connections": {}, "training": {"epochs": epochs, "warmup_epochs": warmup}}, search={})
    with pytest.raises(SpecError, match=rf"training.warmup_epochs is {warmup} and training.epochs is {epochs}; the learning rate would only rise"):
        load_task(path)


def test_a_short_run_warms_up_for_half_of_it() -> None:
    assert [Training(epochs=epochs).warmup_epochs for epochs in (1, 2, 12)] == [0.5, 1.0, 1.0]


def test_fewer_epochs_of_a_comparison_have_as_large_a_share_of_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_ROOT, "/data")
    _, tasks = tasks_to_compare([], "vtab1k", 5)
    assert {(task.recipe.training.epochs, task.recipe.training.warmup_epochs) for task in tasks} == {(5, 0.5)}
    method = Method(recipe=Recipe(), search=SearchSpace())
    assert method.on(tasks[0]).recipe.training.warmup_epochs == 0.5


def test_a_methods_warm_up_must_end_within_the_tasks_epochs(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, recipe={"connections": {}, "training": {"epochs": 5}}, search={}))
    method = Method(recipe=Recipe(training=Training(warmup_epochs=10)), search=SearchSpace(head_bits=(1, 2)))
    with pytest.raises(SpecError, match=r"slow: on the task bars: training\.warmup_epochs is 10 and training\.epochs is 5"):
        compare_methods([task], {"slow": method}, tmp_path / "work", trials=1)


# --- from Python ----------------------------------------------------------------------------


def test_data_without_a_format_is_shards_from_python_too(tmp_path: Path) -> None:
    data = {"train": "train.tar", "test": "test.tar"}
    task = Task.model_validate({"name": "python", "data": data, "backbone": BACKBONE})
    assert task.data == ShardsData(**data)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**TASK, "data": data, "backbone": BACKBONE.model_dump()}))
    assert load_task(tmp_path / "task.yaml").data == ShardsData(train=str(tmp_path / "train.tar"), test=str(tmp_path / "test.tar"))
    assert Task(name="python", data=data, backbone=BACKBONE).data == task.data  # type: ignore[arg-type]
