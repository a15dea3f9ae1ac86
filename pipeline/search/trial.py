"""One trial: one recipe trained on train and scored on validation after every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from pipeline.adaptation import SelectedIndex, attach
from pipeline.spec import Recipe
from pipeline.training import Inputs, Score, evaluate, train_epochs


def recipe_key(recipe: Recipe) -> str:
    """Short SHA-256 of a recipe: equal recipes are one trial."""
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]


def run_trial(inputs: Inputs, recipe: Recipe, selected: SelectedIndex | None, *, device: str = "cpu") -> Iterator[tuple[Score, str]]:
    """Train on train; yields the validation score after every epoch, and in the end a remark on the training, where there is one.

    Raises:
        TrainingError: the loss diverges.
    """
    task = inputs.task
    model = attach(inputs.backbone, recipe, len(inputs.index.classes), selected=selected, seed=task.seed).to(device)
    epochs = train_epochs(model, inputs.reader("train"), inputs.splits["train"], recipe.training, seed=task.seed, flip=task.input.flip, device=device)
    for epoch, _ in enumerate(epochs, start=1):
        remark = model.idle_experts() if epoch == recipe.training.epochs else ""
        yield evaluate(model, inputs.reader("val"), inputs.splits["val"], device=device), remark
