"""The configuration that a study tries next.

A study is a fixed sequence of trials. What trial i tries depends only on the results of trials up
to i - LAG, told in order, never on which trial finished first. So the same seed gives the same
study on any number of workers, and an interrupted study is replayed from its records. A space no
larger than the number of trials is enumerated, which needs no results, so that all its trials may
run at once; a larger one is sampled by Optuna's TPE with the byte budget as a constraint.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.search.trial import recipe_key
from pipeline.search.trial_record import TrialRecord
from pipeline.specs import Recipe, SearchSpace, Task

LAG = 4
"""Maximum number of concurrent trials of a study that learns from their results, and of any study
while others fill the cluster.
"""
_FIT_TRIALS = 1.25
ATTEMPTS_PER_TRIAL = 200
GUIDED_ATTEMPTS = 5
"""Proposals of the sampler per trial before a point is drawn at random: in a small space it repeats
what was tried.
"""


@dataclass(frozen=True)
class Proposal:
    """A configuration within budget, and the size of its pack."""

    id: str
    point: dict[str, Any]
    recipe: Recipe
    size_bytes: int


SizeOf = Callable[[Recipe], int]


class Proposer(Protocol):
    """Proposes the configurations of the trials, in order. `learns`: whether results change what it
    proposes.
    """

    learns: bool
    rejected: list[TrialRecord]

    def propose(self) -> Proposal | None:
        """The configuration of the next trial, or None if there are no more."""

    def tell(self, record: TrialRecord) -> None:
        """Record the result of the earliest trial without one."""


def make_proposer(task: Task, size_of: SizeOf) -> Proposer:
    """Enumerate a small space, sample a large one."""
    return (
        Enumerated(task, size_of)
        if task.search.size() <= task.search.trials
        else Sampled(task, size_of)
    )


def most_at_once(task: Task) -> int:
    """How many trials of a task's study may run at the same time."""
    points = task.search.size()
    return points if points <= task.search.trials else min(LAG, task.search.trials)


def mean_places(task: Task) -> float:
    """How many places the task takes on average beside many others, from its first trial to the
    end of its fit, which takes one place for a little longer than a trial does.
    """
    return places_of(min(task.search.trials, task.search.size()))


def places_of(trials: int) -> float:
    """The average number of places that a study of `trials` trials takes when at most LAG run at
    the same time, see `mean_places`.
    """
    return (trials + _FIT_TRIALS) / (math.ceil(trials / LAG) + _FIT_TRIALS)


def _proposal(space: SearchSpace, base: Recipe, point: dict[str, Any], size_of: SizeOf) -> Proposal:
    recipe = space.recipe(base, point)
    return Proposal(recipe_key(recipe), point, recipe, size_of(recipe))


def _rejection(proposal: Proposal) -> TrialRecord:
    return TrialRecord(
        id=proposal.id,
        point=proposal.point,
        size_bytes=proposal.size_bytes,
        state="rejected",
        message="over budget, not run",
    )


def distinct_proposals(task: Task, size_of: SizeOf) -> list[Proposal]:
    """Every point of the space in its order; points with the same recipe count once."""
    distinct: dict[str, Proposal] = {}
    for point in task.search.points():
        proposal = _proposal(task.search, task.recipe, point, size_of)
        distinct.setdefault(proposal.id, proposal)
    return list(distinct.values())


def smallest_first(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Proposals by ascending size of their packs; of equal sizes by id."""
    return sorted(proposals, key=lambda proposal: (proposal.size_bytes, proposal.id))


class Enumerated:
    """Every distinct point of the space once: configurations in their order, others from the
    smallest pack upwards.
    """

    learns = False

    def __init__(self, task: Task, size_of: SizeOf) -> None:
        ordered = distinct_proposals(task, size_of)
        if task.search.configurations is None:
            ordered = smallest_first(ordered)
        self._waiting = [
            proposal for proposal in ordered if proposal.size_bytes <= task.budget.max_bytes
        ]
        self.rejected = [
            _rejection(proposal)
            for proposal in ordered
            if proposal.size_bytes > task.budget.max_bytes
        ]

    def propose(self) -> Proposal | None:
        return self._waiting.pop(0) if self._waiting else None

    def tell(self, record: TrialRecord) -> None:
        """Do nothing: an enumeration does not learn."""


class Sampled:
    """Optuna's multi-objective TPE over the axes: it maximises the metric and minimises bytes;
    points over budget are reported as infeasible without being run."""

    learns = True

    def __init__(self, task: Task, size_of: SizeOf) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.TPESampler(
                seed=task.seed, n_startup_trials=max(4, task.search.trials // 3)
            )
            self._study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        self._task, self._size_of = task, size_of
        self._random = random.Random(task.seed)
        self._asked: dict[str, Any] = {}
        self._remaining = task.search.trials
        self.rejected: list[TrialRecord] = []

    def propose(self) -> Proposal | None:
        if self._remaining == 0:
            return None
        axes = self._task.search.axes()
        for attempt in range(ATTEMPTS_PER_TRIAL):
            if attempt >= GUIDED_ATTEMPTS:
                self._study.enqueue_trial(
                    {name: self._random.choice(values) for name, values in axes.items()}
                )
            trial = self._study.ask()
            point = {name: trial.suggest_categorical(name, values) for name, values in axes.items()}
            proposal = _proposal(self._task.search, self._task.recipe, point, self._size_of)
            if proposal.size_bytes > self._task.budget.max_bytes:
                self._refuse(trial, proposal)
            elif proposal.id in self._asked:
                self._study.tell(trial, state=_state("FAIL"))
            else:
                self._asked[proposal.id] = trial
                self._remaining -= 1
                return proposal
        return None

    def tell(self, record: TrialRecord) -> None:
        trial = self._asked[record.id]
        if record.state == "failed":
            self._study.tell(trial, state=_state("FAIL"))
            return
        metric = record.val_metric if record.val_metric is not None else record.curve[-1]
        trial.set_constraint("bytes", float(record.size_bytes - self._task.budget.max_bytes))
        self._study.tell(trial, [metric, float(record.size_bytes)])

    def _refuse(self, trial: Any, proposal: Proposal) -> None:
        trial.set_constraint("bytes", float(proposal.size_bytes - self._task.budget.max_bytes))
        self._study.tell(trial, [0.0, float(proposal.size_bytes)])
        if proposal.id not in {record.id for record in self.rejected}:
            self.rejected.append(_rejection(proposal))


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]
