"""The learning rate of a recipe that names none: what it is for a backbone, where it is kept, and
that training with it does not collapse.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import timm
import torch
from helpers_cases import for_every
from torch import nn

from pipeline.adaptation import attach
from pipeline.adaptation.packing import describe
from pipeline.backbones import load_backbone
from pipeline.data import prepare
from pipeline.inputs.learning_rate import default_learning_rate, with_learning_rate
from pipeline.search.trial import run_trial
from pipeline.selection import select_locally
from pipeline.specs import Backbone, CsvData, Input, Recipe, SearchSpace, Selection, Task, Training
from pipeline.specs.catalogue import catalogue_folder
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, open_inputs, train_epochs


@for_every(
    ("model", "rate"),
    [
        ("vit_tiny_patch16_224", 0.008),
        ("vit_small_patch16_224", 0.004),
        ("vit_base_patch16_224", 0.002),
        ("vit_large_patch16_224", 0.0015),
    ],
)
def test_the_rate_falls_with_the_width_from_the_one_that_was_tuned(model: str, rate: float) -> None:
    with torch.device("meta"):
        assert default_learning_rate(timm.create_model(model)) == rate


def test_the_rate_has_a_limit() -> None:
    assert default_learning_rate(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 8, 1))) == 0.008


@pytest.mark.parametrize(
    ("model", "file", "rate"),
    [
        ("vit_small_patch14_dinov2", "vit_small_patch14_dinov2.saliency.safetensors", 0.004),
        ("tf_efficientnet_lite0", "tf_efficientnet_lite0.imagenet1k.safetensors", 0.008),
    ],
)
def test_the_rate_of_real_backbones(
    model: str, file: str, rate: float, shared_folder: Path
) -> None:
    spec = Backbone(model=model, weights=str(shared_folder / "backbones" / file))
    recipe = with_learning_rate(Recipe(), load_backbone(spec, Input(size_px=98)))
    assert recipe == Recipe(training=Training(learning_rate=rate))


def test_the_rate_of_the_demo_is_the_one_that_its_tasks_name() -> None:
    task = load_task(catalogue_folder() / "demo" / "digits.yaml")
    assert (
        default_learning_rate(load_backbone(task.backbone, task.input).model)
        == task.recipe.training.learning_rate
    )


def test_an_opened_task_and_its_packs_say_which_rate_is_used(
    tiny_task: Task, tiny_data: Path
) -> None:
    recipe = Recipe(head={"bits": 4}, training=Training(epochs=3))
    assert recipe.training.learning_rate is None
    inputs = open_inputs(tiny_task.model_copy(update={"recipe": recipe}), tiny_data)
    settled = inputs.task.recipe
    rate = settled.training.learning_rate
    assert rate == default_learning_rate(inputs.backbone.model)
    assert settled == Recipe(head={"bits": 4}, training=Training(epochs=3, learning_rate=rate))
    assert (
        describe(inputs.task, settled, inputs.backbone, ["a", "b"]).recipe["training"][
            "learning_rate"
        ]
        == rate
    )  # type: ignore[index, call-overload]
    assert Task.model_validate_json(inputs.task.model_dump_json()) == inputs.task


def test_a_rate_that_is_named_or_searched_stays(tiny_inputs: Inputs) -> None:
    named = Recipe(training=Training(learning_rate=0.03))
    assert with_learning_rate(named, tiny_inputs.backbone) is named
    searched = SearchSpace(learning_rate=(0.001, 0.02)).recipe(
        with_learning_rate(Recipe(), tiny_inputs.backbone), {"learning_rate": 0.02}
    )
    assert searched.training.learning_rate == 0.02


def test_a_trial_without_a_rate_is_the_trial_with_the_backbones(tiny_inputs: Inputs) -> None:
    unnamed = Recipe(training=Training(epochs=1))
    named = with_learning_rate(unnamed, tiny_inputs.backbone)
    assert list(run_trial(tiny_inputs, unnamed, None)) == list(run_trial(tiny_inputs, named, None))


@pytest.mark.slow
def test_a_vit_with_layer_scale_learns_with_the_default(
    shared_folder: Path, tmp_path: Path
) -> None:
    """Two epochs of DINOv2's ViT-S, everything at one bit: with 0.01 the loss is no lower than
    chance's log(10).
    """
    data, weights = (
        shared_folder / "data" / "dtd10",
        shared_folder / "backbones" / "vit_small_patch14_dinov2.saliency.safetensors",
    )
    one_bit = {"bits": 1}
    task = Task(
        name="dtd10",
        data=CsvData(format="csv", train=str(data / "train.csv"), test=str(data / "test.csv")),
        input=Input(size_px=98),
        backbone=Backbone(model="vit_small_patch14_dinov2", weights=str(weights)),
        recipe=Recipe.model_validate(
            {
                **dict.fromkeys(("connections", "biases", "norms", "smoa", "head"), one_bit),
                "training": {"epochs": 8},
            }
        ),
        selection=Selection(criterion="magnitude"),
    )
    prepare(task, tmp_path)
    inputs = open_inputs(task, tmp_path)
    model = attach(inputs.backbone, inputs.task.recipe, 10, selected=select_locally(inputs, 1))
    epochs = train_epochs(
        model,
        inputs.reader("train"),
        inputs.splits["train"],
        inputs.task.recipe.training,
        inputs.kind,
        seed=0,
        flip=True,
    )
    losses = list(itertools.islice(epochs, 3))
    assert losses[-1] < 0.7 * math.log(10), losses
