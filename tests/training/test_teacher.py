"""Distillation: what a teacher gives as targets, how often it is trained, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_cases import for_every
from pydantic import ValidationError

from pipeline.data import evaluation_batches
from pipeline.errors import TrainingError
from pipeline.search.trial import run_trial
from pipeline.specs import Recipe, Task, Training
from pipeline.training import Inputs, evaluate, teacher, train_epochs
from pipeline.training.fit import PACK_FILE, fit

SHARE = 0.25


@pytest.fixture
def recipe() -> Recipe:
    """The head alone, taught."""
    training = Training(
        epochs=2, batch_size=16, learning_rate=8e-3, precision="fp32", distill=SHARE
    )
    return Recipe(training=training)


@pytest.fixture(autouse=True)
def no_teacher_kept() -> Iterator[None]:
    """Each test trains its own."""
    teacher._KEPT.clear()
    yield
    teacher._KEPT.clear()


def test_targets_are_mixed_of_labels_and_the_teachers_outputs(
    tiny_inputs: Inputs, recipe: Recipe
) -> None:
    split, kind = tiny_inputs.splits["train"], tiny_inputs.kind
    whole = teacher.teacher_recipe(recipe)
    assert whole.training.learning_rate == 8e-3 / 16
    assert whole.full is not None
    model = tiny_inputs.adapted(whole, None)
    for _ in train_epochs(
        model, tiny_inputs.reader("train"), split, whole.training, kind, seed=0, flip=False
    ):
        pass
    outcomes = evaluate(model, tiny_inputs.reader("train"), split, kind)
    labels_NC = F.one_hot(torch.from_numpy(split.labels), len(tiny_inputs.index.classes))
    softened_NC = torch.from_numpy(outcomes.outputs).softmax(dim=1)
    expected_NC = (1 - SHARE) * labels_NC + SHARE * softened_NC
    source = teacher.training_source(tiny_inputs, "train", recipe)
    targets_NC = torch.cat([targets for _, targets in source.batches(evaluation_batches(split, 7))])
    torch.testing.assert_close(targets_NC, expected_NC)
    images = [found for found, _ in source.batches(evaluation_batches(split, 7))]
    plain = [
        found for found, _ in tiny_inputs.reader("train").batches(evaluation_batches(split, 7))
    ]
    assert all(map(torch.equal, images, plain))


def test_the_trials_of_a_study_share_a_teacher(
    tiny_inputs: Inputs, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    monkeypatch.setattr(
        teacher, "train_epochs", lambda *args, **options: trained.append(args) or iter([0.0])
    )
    for changes in ({}, {"weight_decay": 0.1}, {"distill": 0.5}, {"distill": None}):
        training = recipe.training.changed(**changes)
        list(run_trial(tiny_inputs, recipe.changed(training=training), None))
    assert [args[2].name for args in trained] == ["train"] * 2, "weight decay is the teacher's, too"


def test_a_taught_pack_is_another_one_and_the_same_again(
    tiny_inputs: Inputs, recipe: Recipe, tmp_path: Any
) -> None:
    untaught = recipe.changed(training=recipe.training.changed(distill=None))
    digests = []
    for name, each in (("one", recipe), ("again", recipe), ("untaught", untaught)):
        teacher._KEPT.clear()
        fit(tiny_inputs, each, None, tmp_path / name)
        digests.append((tmp_path / name / PACK_FILE).read_bytes())
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_a_teacher_that_diverges(
    tiny_inputs: Inputs, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "RATE_SHARE", 1e30)
    said = (
        r"the teacher, which training.distill asks for, diverged: the loss became (nan|inf) at step"
    )
    with pytest.raises(TrainingError, match=said) as error:
        list(run_trial(tiny_inputs, recipe, None))
    assert str(error.value).endswith("lower training.learning_rate, or leave out distill")


@for_every(
    ("changes", "said"),
    [
        ({"recipe": {"preset": "linear", "training": {"distill": 0}}}, "greater than 0"),
        (
            {"recipe": {"preset": "linear", "training": {"distill": 0.5, "mixup": 0.2}}},
            "distill has a teacher's outputs for whole images",
        ),
        (
            {
                "kind": "segmentation",
                "data": {"format": "drawn", "kind": "shapes"},
                "recipe": {"preset": "linear", "training": {"distill": 0.5}},
            },
            "of kind segmentation; only classification can be distilled",
        ),
    ],
)
def test_what_cannot_be_distilled(tiny_task: Task, changes: dict[str, Any], said: str) -> None:
    content = tiny_task.model_dump(include={"name", "data", "backbone"})
    with pytest.raises(ValidationError, match=said):
        Task.model_validate({**content, **changes})
