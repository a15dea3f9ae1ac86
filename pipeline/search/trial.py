"""One trial: a recipe trained on train and scored on validation after every epoch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.adaptation import SelectedIndex
from pipeline.inputs.learning_rate import with_learning_rate
from pipeline.inputs.out_of_memory import named_out_of_memory
from pipeline.kinds import Outcomes, Score, score
from pipeline.search.folds import in_folds
from pipeline.search.kept_outcomes import write_outcomes
from pipeline.selection import read_selection
from pipeline.specs import Recipe, Task
from pipeline.training import ALONE, Inputs, Ranks, evaluate, open_inputs, train_epochs
from pipeline.training.teacher import training_source


def recipe_key(recipe: Recipe) -> str:
    """Short SHA-256 of a recipe: equal recipes are one trial."""
    return hashlib.sha256(recipe.model_dump_json(exclude_none=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def opened(
    task_json: str, recipe_json: str, data_folder: str, selection: Path | str | None, device: str
) -> Iterator[tuple[Inputs, Recipe, SelectedIndex | None]]:
    """Open what a worker is sent for a trial or a fit: the task with its data and backbone, the
    recipe, the connections.

    Raises:
        OutOfMemory: Opening or using it on `device` takes more memory than there is.
    """
    task, recipe = Task.model_validate_json(task_json), Recipe.model_validate_json(recipe_json)
    with named_out_of_memory(task, recipe.training.batch_size, device):
        yield (
            open_inputs(task, Path(data_folder)),
            recipe,
            read_selection(Path(selection)) if selection is not None else None,
        )


def run_trial(
    inputs: Inputs,
    recipe: Recipe,
    selected: SelectedIndex | None,
    *,
    device: str = "cpu",
    ranks: Ranks = ALONE,
    kept: Path | None = None,
) -> Iterator[tuple[Score, str]]:
    """Train on train; yield the validation score after every epoch, and finally a warning about the
    training, if any.

    The models of several folds train in turn, an epoch each, and are scored together.

    Args:
        selected: the connections of the first fold; those of the others are selected here.
        ranks: the processes that train together; all get the same scores.
        kept: file for the validation outputs of the last epoch, which the first rank writes.

    Raises:
        TrainingError: The loss diverges.
        ClusterError: The ranks no longer have the same values.
        StorageError: The outputs cannot be written.
    """
    recipe = with_learning_rate(recipe, inputs.backbone)
    folds = [
        _outcomes(fold, recipe, chosen, device, ranks)
        for fold, chosen in in_folds(inputs, recipe, selected, device)
    ]
    for epoch, of_folds in enumerate(zip(*folds, strict=True), start=1):
        outcomes = Outcomes(
            np.concatenate([found.outputs for found, _ in of_folds]),
            np.concatenate([found.targets for found, _ in of_folds]),
        )
        if epoch == recipe.training.epochs and kept is not None and ranks.is_first:
            write_outcomes(kept, outcomes)
        remarks = dict.fromkeys(remark for _, remark in of_folds if remark)
        yield score(inputs.metric, outcomes), "; ".join(remarks)


def _outcomes(
    inputs: Inputs, recipe: Recipe, selected: SelectedIndex | None, device: str, ranks: Ranks
) -> Iterator[tuple[Outcomes, str]]:
    """Train in one fold; yield the validation outputs after every epoch, and finally a warning."""
    task = inputs.task
    model = inputs.adapted(recipe, selected).to(device)
    source = training_source(inputs, "train", recipe, device=device, ranks=ranks)
    data = source, inputs.splits["train"]
    options: dict[str, Any] = {"flip": task.input.flip, "device": device, "ranks": ranks}
    epochs = train_epochs(model, *data, recipe.training, inputs.kind, seed=task.seed, **options)
    reader, split = inputs.reader("val"), inputs.splits["val"]
    for epoch, _ in enumerate(epochs, start=1):
        is_last = epoch == recipe.training.epochs
        remark = model.idle_experts(ranks.total) if is_last else ""
        outcomes = evaluate(model, reader, split, inputs.kind, ranks=ranks, is_exact=False)
        yield outcomes, remark
