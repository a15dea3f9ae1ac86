"""Backbones without a network, and defaults that follow the backbone."""

from __future__ import annotations

import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.adaptation import plan
from pipeline.api import run
from pipeline.backbones import hub, load_backbone
from pipeline.errors import BackboneError, SpecError
from pipeline.inputs.preset import on_backbone
from pipeline.specs import DEFAULT_PARTS, Backbone, Input, Method, Task
from pipeline.specs.faults import validate
from pipeline.specs.task_files import load_task

Arguments = dict[str, int | float | str | bool | list[int]]

# --- without a network ----------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def mute_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def refusal_of(model: str) -> str:
    with pytest.raises(BackboneError) as refusal:
        load_backbone(Backbone(model=model), Input())
    return str(refusal.value)


MODELS = ["vit_tiny_patch16_224", "gcvit_base.in1k", "hf-hub:someone/absent"]


@pytest.mark.parametrize("model", MODELS)
def test_without_a_network_pretrained_weights_are_refused_at_once(
    model: str,
    empty_cache: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    started = time.monotonic()
    assert re.search(
        r"cannot be reached \((Connection refused|no answer in \d+ s)\).*`weights`"
        ".*--backbone FILE",
        refusal_of(model),
    )
    assert time.monotonic() - started < 15, "hubs' clients try again for 46 seconds"
    assert capfd.readouterr().err == ""


def test_a_network_that_does_not_answer_is_given_up(
    empty_cache: None, mute_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", mute_server)
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)
    started = time.monotonic()
    assert "cannot be reached" in refusal_of("vit_tiny_patch16_224")
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("model", MODELS)
def test_a_hub_that_is_switched_off_is_not_asked(
    model: str, empty_cache: None, mute_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", mute_server)
    started = time.monotonic()
    assert "HF_HUB_OFFLINE is set" in refusal_of(model)
    assert time.monotonic() - started < 2


def test_any_answer_is_a_network() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert hub._no_answer(f"http://127.0.0.1:{server.server_port}/absent") is None


# --- defaults follow the backbone -----------------------------------------------------------------

CLASSES = tuple("0123456789")
CNN = {"model": "test_resnet", "weights": "random"}


def digits(**sections: object) -> Task:
    return validate(
        Task,
        {"name": "a", "data": {"format": "digits"}, "backbone": CNN, **sections},
        source="task",
    )


@pytest.mark.parametrize(
    ("arguments", "size_px", "expected"),
    [
        ({}, None, 160),
        ({"img_size": 96}, None, 96),
        ({"img_size": [96, 96]}, None, 96),
        ({"img_size": 96}, 32, 32),
    ],
)
def test_images_have_the_size_that_the_backbone_is_built_for(
    arguments: Arguments, size_px: int | None, expected: int
) -> None:
    backbone = load_backbone(
        Backbone(model="test_vit", arguments=arguments, weights="random"), Input(size_px=size_px)
    )
    assert backbone.size_px == expected


def test_the_default_recipe_keeps_what_has_a_place() -> None:
    """A ResNet has convolutions without biases, and no MLPs."""
    task = digits(search={"trials": 3})
    resolved, absent = on_backbone(task, load_backbone(task.backbone, Input()), CLASSES)
    assert [*absent] == ["biases", "smoa", "adapter", "lora"]
    assert resolved.recipe == task.recipe.model_copy(
        update={"biases": None, "smoa": None, "preset": None}
    )
    assert {point["parts"] for point in resolved.search.configurations or ()} == {
        "head",
        "connections",
        "norms",
        "connections+norms",
    }
    assert resolved.search.trials == 3
    assert on_backbone(resolved, load_backbone(task.backbone, Input()), CLASSES) == (resolved, {})


def test_the_default_recipe_is_whole_where_everything_has_a_place(tiny_backbone: Backbone) -> None:
    task = digits(backbone=tiny_backbone.model_dump())
    resolved, absent = on_backbone(task, load_backbone(tiny_backbone, Input()), CLASSES)
    assert absent == {}
    assert resolved.recipe == task.recipe.model_copy(update={"preset": None})


def test_axes_that_are_given_stay(tiny_backbone: Backbone) -> None:
    task = digits(backbone=tiny_backbone.model_dump(), search={"learning_rate": [0.1]})
    resolved, _ = on_backbone(task, load_backbone(tiny_backbone, Input()), CLASSES)
    assert resolved.search == task.search


@pytest.mark.parametrize(
    "recipe", [{"connections": {}, "norms": {}}, {"preset": "default", "norms": {}}]
)
def test_a_part_that_was_named_is_required(recipe: dict[str, object]) -> None:
    task = digits(recipe=recipe)
    backbone = load_backbone(task.backbone, Input())
    with pytest.raises(BackboneError, match=r"recipe\.norms"):
        plan(backbone, on_backbone(task, backbone, CLASSES)[0].recipe, 2)


def test_an_unresolved_task_is_the_same_after_a_round_trip() -> None:
    task = digits(recipe={"preset": "default", "connections": None, "smoa": {"experts": 8}})
    assert task.recipe.preset == ("biases", "norms", "adapter", "lora")
    assert Task.model_validate_json(task.model_dump_json()) == task


def test_a_preset_is_the_default_with_what_is_written() -> None:
    recipe = digits(
        recipe={
            "preset": "default",
            "connections": None,
            "biases": {"bits": 4},
            "training": {"epochs": 3},
        }
    ).recipe
    assert (
        recipe.connections,
        recipe.biases.bits if recipe.biases else None,
        recipe.training.epochs,
    ) == (None, 4, 3)
    assert (recipe.smoa, recipe.norms) == (DEFAULT_PARTS["smoa"], DEFAULT_PARTS["norms"])
    assert digits(recipe={"preset": "linear"}).recipe == digits(recipe={"connections": None}).recipe


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"training": {"epochs": 3}}, "`preset: default`.*`preset: linear`"),
        ({"head": {"bits": 32}}, "`preset: default`.*`preset: linear`"),
        ({"preset": "none", "biases": {}}, "'none'; expected default or linear"),
        ({"preset": "linear", "biases": {}}, "given biases too"),
    ],
)
def test_a_recipe_means_the_same_in_tasks_and_methods(
    recipe: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message) as refusal:
        digits(recipe=recipe)
    assert "\n" not in str(refusal.value)
    with pytest.raises(SpecError, match=message):
        validate(Method, {"recipe": recipe, "search": {"learning_rate": [0.1]}}, source="method")


def test_a_preset_replaces_the_parts_of_a_base(tmp_path: Path) -> None:
    base = {
        "name": "base",
        "data": {"format": "digits"},
        "backbone": CNN,
        "recipe": {"lora": {}, "training": {"epochs": 7}},
    }
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    (tmp_path / "own.yaml").write_text(
        json.dumps({"base": "base.yaml", "name": "own", "recipe": {"preset": "linear"}})
    )
    recipe = load_task(tmp_path / "own.yaml").recipe
    assert (recipe.lora, recipe.training.epochs) == (None, 7)


@pytest.mark.slow
def test_real_backbones_run_end_to_end(shared_folder: Path, tmp_path: Path) -> None:
    """Forty photographs, one trial and epoch each; recipe and search space are the default's."""
    photos = shared_folder / "data" / "dtd10"
    for split, count in (("train", 40), ("test", 20)):
        header, *rows = (photos / f"{split}.csv").read_text().splitlines()
        by_class: dict[str, list[str]] = {}
        for row in rows:
            by_class.setdefault(row.rpartition(",")[2], []).append(row)
        chosen = [
            row
            for rows_of_one in by_class.values()
            for row in rows_of_one[: count // len(by_class)]
        ]
        (tmp_path / f"{split}.csv").write_text("\n".join([header, *chosen]) + "\n")
    data = {
        "format": "csv",
        "train": str(tmp_path / "train.csv"),
        "test": str(tmp_path / "test.csv"),
        "root": str(photos),
    }
    recipe = {"preset": "default", "training": {"epochs": 1, "warmup_epochs": 0, "batch_size": 8}}
    for model, file, size_px in (
        ("vit_small_patch14_dinov2", "vit_small_patch14_dinov2.saliency.safetensors", 28),
        ("tf_efficientnet_lite0", "tf_efficientnet_lite0.imagenet1k.safetensors", 64),
    ):
        backbone = {"model": model, "weights": str(shared_folder / "backbones" / file)}
        rest = {
            "input": {"size_px": size_px},
            "recipe": recipe,
            "search": {"trials": 1},
            "selection": {"batch_size": 8},
            "val_fraction": 0.25,
        }
        (tmp_path / f"{model}.yaml").write_text(
            json.dumps(
                {"name": model.replace("_", "-"), "data": data, "backbone": backbone, **rest}
            )
        )
    outcomes = run(sorted(tmp_path.glob("*.yaml")), workdir=tmp_path / "work")
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert all(
        outcome.registered is not None and outcome.registered.size_bytes <= 65536
        for outcome in outcomes
    )
