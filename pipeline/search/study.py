"""A study: all trials of one task and their results, independent of Ray.

Which configuration comes next, what is recorded and when a trial stops are decided here, from
records alone (see `proposer`). A trial competes with those up to LAG numbers before it. Where it
ends before they have, it is recorded once they have, as if it had been stopped in time: so the
records are the same for any number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import TaskpackError
from pipeline.search.proposer import LAG, Proposal, Proposer
from pipeline.search.stopping import is_dominated
from pipeline.search.trial_record import TrialJournal, TrialRecord
from pipeline.specs import Task


class Study:
    """The trials of a study by number, their results, and what may start next. `ended` are those
    that this run ended, in order of time.
    """

    def __init__(self, task: Task, proposer: Proposer, journal: TrialJournal) -> None:
        self.task = task
        self.proposals: list[Proposal] = []
        self.records: dict[int, TrialRecord] = {}
        self.ended: list[int] = []
        self._proposer, self._journal = proposer, journal
        self._remembered = journal.read()
        self._unsettled_before = journal.read_unsettled()
        self._unsettled: dict[int, TrialRecord] = {}
        self._held: Proposal | None = None
        self._told = 0
        self._curves: dict[int, list[float]] = {}
        self._errors: dict[int, list[float]] = {}
        self._stopped: set[int] = set()
        self._ended_here: set[int] = set()
        self.is_exhausted = False

    def next_trial(self) -> int | None:
        """The number of the next trial to run; None if it must wait for earlier ones or nothing is
        left (`is_exhausted`).
        """
        while not self.is_exhausted:
            number = len(self.proposals)
            if self._proposer.learns:
                if not self._rivals_have_ended(number):
                    return None
                while self._told <= number - LAG:
                    self._proposer.tell(self.records[self._told])
                    self._told += 1
            proposal, self._held = self._held or self._proposer.propose(), None
            if proposal is None:
                self.is_exhausted = True
                return None
            remembered = self._remembered.get(proposal.id)
            is_stopped = remembered is not None and remembered.state == "stopped"
            if is_stopped and not self._rivals_have_ended(number):
                self._held = proposal
                return None
            self.proposals.append(proposal)
            if not self._recall(number, proposal):
                return number
        return None

    def _recall(self, number: int, proposal: Proposal) -> bool:
        """Take what an earlier run has kept of a trial; whether it kept something."""
        # The same recipe may be another point of another space on another base recipe.
        here: dict[str, Any] = {"point": proposal.point, "size_bytes": proposal.size_bytes}
        if self._holds(number, proposal):
            self.records[number] = replace(self._remembered[proposal.id], **here)
        elif proposal.id in self._unsettled_before:
            self._unsettled[number] = replace(self._unsettled_before[proposal.id], **here)
        else:
            return False
        self._settle()
        return True

    def has_ended(self, number: int) -> bool:
        """Whether a trial has ended, be it recorded or not yet."""
        return number in self.records or number in self._unsettled

    def outcomes(self) -> list[TrialRecord]:
        """The records, and what trials that are not recorded yet have ended with."""
        return [*self.records.values(), *self._unsettled.values()]

    def _rivals_have_ended(self, number: int) -> bool:
        """Whether all trials are recorded that may stop this one."""
        return all(earlier in self.records for earlier in range(number - LAG + 1))

    def _holds(self, number: int, proposal: Proposal) -> bool:
        """Whether a record is what this study would find: its trial may have been stopped against
        one that is not in this space.
        """
        record = self._remembered.get(proposal.id)
        if record is None or record.state != "stopped":
            return record is not None
        return bool(record.errors) and self._is_dominated(number, record.curve, record.errors)

    def _is_dominated(self, number: int, curve: Sequence[float], errors: Sequence[float]) -> bool:
        proposal = self.proposals[number]
        earlier = [
            self.records[other] for other in range(number - LAG + 1) if other in self.records
        ]
        return is_dominated(
            curve, errors[-1], proposal.recipe.training.epochs, proposal.size_bytes, earlier
        )

    def report(self, number: int, epoch: int, metric: float, standard_error: float) -> bool:
        """Record a trial's metric after an epoch (counted from 1); return whether the trial should
        continue.
        """
        curve = self._curves[number] = [*self._curves.get(number, [])[: epoch - 1], metric]
        errors = self._errors[number] = [*self._errors.get(number, [])[: epoch - 1], standard_error]
        if self._rivals_have_ended(number) and self._is_dominated(number, curve, errors):
            self._stopped.add(number)
            return False
        return True

    def finish(
        self,
        number: int,
        seconds: float,
        failure: TaskpackError | None,
        *,
        remark: str = "",
        usage: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a trial's outcome, as soon as those that may stop it have ended. A transient
        failure is not written to disk, so that a later run tries again. `usage`: fields of the
        record about the trial's device.
        """
        curve, proposal = tuple(self._curves.get(number, ())), self.proposals[number]
        outcome: dict[str, Any]
        if failure is not None:
            outcome = self._journal.failure(proposal.id, failure)
        elif number in self._stopped:
            outcome = {"state": "stopped", "message": remark}
        else:
            outcome = {"state": "complete", "val_metric": curve[-1], "message": remark}
        record = TrialRecord(
            id=proposal.id,
            point=proposal.point,
            size_bytes=proposal.size_bytes,
            curve=curve,
            errors=tuple(self._errors.get(number, ())),
            seconds=round(seconds, 2),
            ended=round(time.time(), 2),
            **(usage or {}),
            **outcome,
        )
        self._unsettled[number] = record
        self._ended_here.add(number)
        if not self._rivals_have_ended(number):
            self._journal.write_unsettled(record)
        self._settle()

    def close(self) -> None:
        """Record what has ended, though trials that may have stopped it were left out."""
        self._settle(waits=False)

    def _settle(self, *, waits: bool = True) -> None:
        """Record the trials that have ended; those whose rivals have not wait, unless told not
        to.
        """
        for number in sorted(self._unsettled):
            if waits and not self._rivals_have_ended(number):
                continue
            record = self.records[number] = self._decided(number, self._unsettled.pop(number))
            if number in self._ended_here:
                self.ended.append(number)
            self._journal.write(record)

    def _decided(self, number: int, record: TrialRecord) -> TrialRecord:
        """A trial's record, cut off where it would have been stopped."""
        for epoch in range(1, len(record.curve) + 1):
            curve, errors = record.curve[:epoch], record.errors[:epoch]
            if self._is_dominated(number, curve, errors):
                stopped = replace(record, state="stopped", val_metric=None, error="")
                message = "" if record.state == "failed" else record.message
                return replace(stopped, curve=curve, errors=errors, message=message)
        return record

    def kept(self, number: int) -> Path:
        """Where the worker of a trial keeps its validation outputs."""
        return self._journal.outcomes_path(self.proposals[number].id)

    def epochs_done(self) -> float:
        """Finished epochs in units of trials: a finished trial counts as one."""
        running = {
            number: len(curve) / self.proposals[number].recipe.training.epochs
            for number, curve in self._curves.items()
            if not self.has_ended(number)
        }
        return len(self.records) + len(self._unsettled) + sum(running.values())

    def trials_planned(self) -> int:
        """Maximum number of trials, including those of earlier runs."""
        if self.is_exhausted:
            return len(self.proposals)
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
        """Every trial, in order of numbers, then those rejected without being run."""
        return [
            *(self.records[number] for number in sorted(self.records)),
            *self._proposer.rejected,
        ]


OnRecord = Callable[[Study], None]
