"""A study of trials that end when a test says so, for the tests of what is watched."""

from __future__ import annotations

from pathlib import Path

from pipeline.search.proposer import make_proposer
from pipeline.search.study import Study
from pipeline.search.trial_record import TrialJournal
from pipeline.specs import Recipe, SearchSpace, Task

STANDARD_ERROR = 0.05


def size_of(recipe: Recipe) -> int:
    return 1000 * recipe.head.bits


def make_study(task: Task, folder: Path) -> Study:
    """Four trials of two epochs, of 1000 to 8000 bytes."""
    task = task.model_copy(update={"search": SearchSpace(head_bits=[1, 2, 4, 8])})
    return Study(task, make_proposer(task, size_of), TrialJournal(folder))


def end_trial(
    study: Study, number: int, metric: float, seconds: float, **usage: float | None
) -> None:
    for epoch in (1, 2):
        study.report(number, epoch, metric, STANDARD_ERROR)
    study.finish(number, seconds, None, usage=usage)
