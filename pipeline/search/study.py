"""A study: all trials of one task and their results, independent of Ray.

Which configuration comes next, what is recorded and when a trial stops are decided here, from
records alone (see `proposer`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import TaskpackError
from pipeline.search.proposer import LAG, Proposal, Proposer
from pipeline.search.stopping import is_dominated
from pipeline.search.trial_record import TrialJournal, TrialRecord
from pipeline.specs import Task


class Study:
    """The slots of a study, their results, and what may start next. `ended` are the slots that this
    run ended, in order of time.
    """

    def __init__(self, task: Task, proposer: Proposer, journal: TrialJournal) -> None:
        self.task = task
        self.slots: list[Proposal] = []
        self.records: dict[int, TrialRecord] = {}
        self.ended: list[int] = []
        self._proposer, self._journal = proposer, journal
        self._remembered = journal.read()
        self._told = 0
        self._curves: dict[int, list[float]] = {}
        self._errors: dict[int, list[float]] = {}
        self._stopped: set[int] = set()
        self.is_exhausted = False

    def next_slot(self) -> int | None:
        """The next slot to run; None if it must wait for earlier ones or nothing is left
        (`is_exhausted`).
        """
        while not self.is_exhausted:
            slot = len(self.slots)
            if any(earlier not in self.records for earlier in range(slot - LAG + 1)):
                return None
            while self._told <= slot - LAG:
                self._proposer.tell(self.records[self._told])
                self._told += 1
            proposal = self._proposer.propose()
            if proposal is None:
                self.is_exhausted = True
                return None
            self.slots.append(proposal)
            if not self._holds(slot, proposal):
                return slot
            # The same recipe may be another point of another space on another base recipe.
            self.records[slot] = replace(
                self._remembered[proposal.id], point=proposal.point, size_bytes=proposal.size_bytes
            )
        return None

    def _holds(self, slot: int, proposal: Proposal) -> bool:
        """Whether a record is what this study would find: its trial may have been stopped against
        one that is not in this space.
        """
        record = self._remembered.get(proposal.id)
        if record is None or record.state != "stopped":
            return record is not None
        return bool(record.errors) and self._is_dominated(slot, record.curve, record.errors)

    def _is_dominated(self, slot: int, curve: Sequence[float], errors: Sequence[float]) -> bool:
        proposal = self.slots[slot]
        earlier = [self.records[other] for other in range(slot - LAG + 1)]
        return is_dominated(
            curve, errors[-1], proposal.recipe.training.epochs, proposal.size_bytes, earlier
        )

    def report(self, slot: int, epoch: int, metric: float, standard_error: float) -> bool:
        """Record a trial's metric after an epoch (counted from 1); return whether the trial should
        continue.
        """
        curve = self._curves[slot] = [*self._curves.get(slot, [])[: epoch - 1], metric]
        errors = self._errors[slot] = [*self._errors.get(slot, [])[: epoch - 1], standard_error]
        if self._is_dominated(slot, curve, errors):
            self._stopped.add(slot)
            return False
        return True

    def finish(
        self, slot: int, seconds: float, failure: TaskpackError | None, *, remark: str = ""
    ) -> None:
        """Record a trial's outcome. A transient failure is not written to disk, so that a later run
        tries again.
        """
        curve, proposal = tuple(self._curves.get(slot, ())), self.slots[slot]
        outcome: dict[str, Any]
        if failure is not None:
            outcome = self._journal.failure(proposal.id, failure)
        elif slot in self._stopped:
            outcome = {"state": "stopped", "message": remark}
        else:
            outcome = {"state": "complete", "val_metric": curve[-1], "message": remark}
        record = TrialRecord(
            id=proposal.id,
            point=proposal.point,
            size_bytes=proposal.size_bytes,
            curve=curve,
            errors=tuple(self._errors.get(slot, ())),
            seconds=round(seconds, 2),
            ended=round(time.time(), 2),
            **outcome,
        )
        self.records[slot] = record
        self.ended.append(slot)
        self._journal.write(record)

    def kept(self, slot: int) -> Path:
        """Where the worker of a trial keeps its validation outputs."""
        return self._journal.outcomes_path(self.slots[slot].id)

    def epochs_done(self) -> float:
        """Finished epochs in units of trials: a finished trial counts as one."""
        running = {
            slot: len(curve) / self.slots[slot].recipe.training.epochs
            for slot, curve in self._curves.items()
            if slot not in self.records
        }
        return len(self.records) + sum(running.values())

    def trials_planned(self) -> int:
        """Maximum number of trials, including those of earlier runs."""
        if self.is_exhausted:
            return len(self.slots)
        return min(self.task.search.trials, self.task.search.size() - len(self._proposer.rejected))

    def remark(self) -> str:
        """A short text about the best complete trial so far."""
        scored = [
            (record.val_metric, record.size_bytes)
            for record in self.records.values()
            if record.val_metric is not None
        ]
        best = max(scored, key=lambda pair: (pair[0], -pair[1]), default=None)
        counted = f"{len(self.records)} trials"
        return (
            counted
            if best is None
            else f"{counted}, best {self.task.metric} {best[0]:.1%} at {best[1] / 1024:.1f} KiB"
        )

    def all_records(self) -> list[TrialRecord]:
        """Every trial, in order of slots, then those rejected without being run."""
        return [*(self.records[slot] for slot in sorted(self.records)), *self._proposer.rejected]


OnRecord = Callable[[Study], None]
