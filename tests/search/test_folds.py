"""Trials that are validated on all of train, fold by fold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.driver.workspace import Workspace
from pipeline.search.kept_outcomes import read_outcomes
from pipeline.search.trial import run_trial
from pipeline.selection import select_locally
from pipeline.specs import Connections, Recipe, Training
from pipeline.training import Inputs

FOLDS = 3
RECIPE = Recipe(
    connections=Connections(bits=1),
    training=Training(epochs=2, batch_size=16, learning_rate=8e-3, precision="fp32"),
)


@pytest.fixture(scope="module")
def in_folds(tiny_inputs: Inputs) -> Inputs:
    """The tiny task in folds, opened."""
    task = tiny_inputs.task.model_copy(update={"folds": FOLDS})
    opened = replace(tiny_inputs, task=task)
    return replace(opened, splits=opened.folds[0].splits)


def test_a_trial_joins_the_outputs_of_its_folds(in_folds: Inputs, tmp_path: Path) -> None:
    """Each fold is a trial of its own, whose connections are selected on what it trains on."""
    kept = tmp_path / "kept"
    selected = select_locally(in_folds, 1)
    scores = [score for score, _ in run_trial(in_folds, RECIPE, selected, kept=kept)]
    alone = []
    for number, fold in enumerate(in_folds.folds):
        whole = replace(fold, task=fold.task.model_copy(update={"folds": 1}))
        path = tmp_path / str(number)
        found = [score for score, _ in run_trial(whole, RECIPE, select_locally(fold, 1), kept=path)]
        alone.append((found, read_outcomes(path)))
    joined = read_outcomes(kept)
    assert joined is not None
    parts = [outcomes for _, outcomes in alone if outcomes is not None]
    np.testing.assert_array_equal(joined.outputs, np.concatenate([each.outputs for each in parts]))
    np.testing.assert_array_equal(joined.targets, np.concatenate([each.targets for each in parts]))
    assert len(joined) == len(in_folds.splits["trainval"]) == in_folds.validation_samples
    for epoch, score in enumerate(scores):
        assert score.samples == len(joined)
        mean = np.average(
            [found[epoch].value for found, _ in alone], weights=[len(each) for each in parts]
        )
        assert score.value == pytest.approx(mean)


def test_each_fold_has_its_own_connections(in_folds: Inputs) -> None:
    """The first fold's selection has seen what the others are validated on."""
    first, second, _ = (select_locally(fold, 1) for fold in in_folds.folds)
    assert any(not np.array_equal(first[name].index_M, second[name].index_M) for name in first)


def test_a_trial_in_folds_repeats_exactly(in_folds: Inputs) -> None:
    recipe = RECIPE.changed(connections=None)
    assert list(run_trial(in_folds, recipe, None)) == list(run_trial(in_folds, recipe, None))


def test_trials_in_folds_are_kept_apart(tiny_inputs: Inputs, in_folds: Inputs) -> None:
    workspace = Workspace(Path("work"))
    others = replace(in_folds, task=in_folds.task.model_copy(update={"folds": 2}))
    folders = {workspace.study(each, 1).root for each in (tiny_inputs, in_folds, others)}
    assert len(folders) == 3
