"""The folds of a trial, each with its connections.

Connections are selected by the labels of a training set, so the selection that serves the fit has
seen the samples that the other folds are validated on. Each fold has its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from pipeline.adaptation import SelectedIndex, is_recomputable
from pipeline.selection import select_locally
from pipeline.specs import Recipe, Task
from pipeline.training import Inputs, open_inputs


def in_folds(
    inputs: Inputs, recipe: Recipe, selected: SelectedIndex | None, device: str
) -> Iterator[tuple[Inputs, SelectedIndex | None]]:
    """The task in each of its folds, and the connections that the recipe may change there.

    Args:
        selected: those of the first fold.
    """
    connections = None if is_recomputable(inputs.task.selection) else recipe.connections
    for number, fold in enumerate(inputs.folds):
        if number == 0 or connections is None:
            yield fold, selected
        else:
            task = inputs.task.model_dump_json()
            yield fold, _selected(task, inputs.data_folder, number, connections.top_k, device)


@functools.lru_cache(maxsize=32)
def _selected(
    task_json: str, data_folder: Path, fold: int, top_k: int, device: str
) -> SelectedIndex:
    """The selection in one fold, which this process keeps for its next trials."""
    inputs = open_inputs(Task.model_validate_json(task_json), data_folder)
    return select_locally(inputs.folds[fold], top_k, device=device)
