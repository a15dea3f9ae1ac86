"""Studies and results for the tests of the search."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hypothesis import settings

from pipeline.errors import TrainingError
from pipeline.search.proposer import make_proposer
from pipeline.search.study import Study
from pipeline.search.trial_record import TrialJournal, TrialRecord
from pipeline.specs import (
    Backbone,
    Budget,
    Connections,
    DrawnData,
    Recipe,
    SearchSpace,
    Smoa,
    Task,
    Training,
)

EPOCHS = 6


DIVERGED = TrainingError("the loss became nan")


STANDARD_ERROR = 0.015
"""Of some thousand samples."""


quick = settings(max_examples=15, derandomize=True, deadline=None)


SMALL = SearchSpace(bits=(1, 4), experts=(0, 2), top_k=(0, 1, 3), trials=12)


LARGE = SearchSpace(
    bits=(1, 2, 4, 8), experts=(0, 1, 2, 4), top_k=(1, 2, 3), learning_rate=(1e-3, 3e-3), trials=12
)


def make_task(space: SearchSpace, max_bytes: int = 10_000, seed: int = 0) -> Task:
    return Task(
        name="study",
        data=DrawnData(format="drawn", kind="counting"),
        backbone=Backbone(model="vit_tiny_patch16_224", weights="random"),
        recipe=Recipe(
            connections=Connections(),
            smoa=Smoa(),
            training=Training(epochs=EPOCHS, learning_rate=8e-3),
        ),
        search=space,
        budget=Budget(max_bytes=max_bytes),
        seed=seed,
    )


def fake_size(recipe: Recipe) -> int:
    connections = (
        recipe.connections.top_k * recipe.connections.bits * 10 if recipe.connections else 0
    )
    return 100 + connections + (recipe.smoa.experts * recipe.smoa.bits * 25 if recipe.smoa else 0)


def fake_metric(identity: str, epoch: int) -> float:
    """A learning curve that the trial's id decides; they cross and spread enough that some trials
    are stopped.
    """
    level = int(hashlib.sha256(identity.encode()).hexdigest()[:4], 16) / 0xFFFF
    return round((0.2 + 0.7 * level) * epoch / EPOCHS, 6)


def make_study(task: Task, folder: Path) -> Study:
    return Study(task, make_proposer(task, fake_size), TrialJournal(folder))


def drive_one(study: Study, number: int, failing: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    for epoch in range(1, EPOCHS + 1):
        if not study.report(
            number, epoch, fake_metric(study.proposals[number].id, epoch), STANDARD_ERROR
        ):
            return study.finish(number, 1.0, None)
        if number in failing and epoch == 1:
            return study.finish(number, 1.0, DIVERGED)
    return study.finish(number, 1.0, None)


def record(
    size_bytes: int, *curve: float, state: str = "complete", identity: str = ""
) -> TrialRecord:
    metric = curve[-1] if state == "complete" else None
    identity = identity or f"{size_bytes}-{curve}-{state}"
    return TrialRecord(
        id=identity, point={}, size_bytes=size_bytes, state=state, val_metric=metric, curve=curve
    )  # type: ignore[arg-type]
