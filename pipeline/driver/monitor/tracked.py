"""A running task as the driver tracks it, with the time remaining estimated from the trials that
have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.driver.monitor.state import WAITING, TaskState
from pipeline.search.study import Study
from pipeline.search.time_limit import mean_trial_seconds
from pipeline.search.trial_record import USAGE_FIELDS, TrialRecord


def remaining_seconds(done: float, left: float, elapsed_seconds: float) -> float | None:
    """Seconds for the remaining work at the pace so far; None if nothing is done yet."""
    return elapsed_seconds * left / done if done > 0 else None


@dataclass
class TrackedTask:
    """One task of a running batch; times in seconds of one clock.

    `units` are trials' worth of epochs: `units_done` were trained by this run since it entered the
    search, `units_left` are to be trained at most. A trial trains on `samples` samples, and a fit
    trains one recipe as a trial does, on `fit_ratio` times as many. `last` is the trial that ended
    last.
    """

    name: str
    stage: str = WAITING
    entered: float = 0.0
    remark: str = ""
    trials: int | None = None
    trials_done: int = 0
    trials_running: int = 0
    best: TrialRecord | None = None
    units_done: float = 0.0
    units_left: float = 0.0
    trial_seconds: float | None = None
    fit_ratio: float = 1.0
    samples: int = 0
    last: TrialRecord | None = None

    def enter(self, stage: str, now: float, remark: str) -> None:
        """Enter a stage, or update its remark."""
        if stage != self.stage:
            self.stage, self.entered, self.trials_running = stage, now, 0
        self.remark = remark

    def follow(self, study: Study) -> None:
        """Update from a running study."""
        kept = len(study.records) - len(study.ended)
        self.trials = study.trials_planned()
        self.trials_running = len(study.proposals) - len(study.outcomes())
        self.units_done, self.units_left = (
            study.epochs_done() - kept,
            self.trials - study.epochs_done(),
        )
        self.take(list(study.records.values()))
        if study.ended:
            self.last = study.records[study.ended[-1]]

    def take(self, records: Sequence[TrialRecord], champion: TrialRecord | None = None) -> None:
        """Update from the results of trials. The best is shown until the champion is chosen."""
        ran = [record for record in records if record.state != "rejected"]
        complete = [record for record in ran if record.val_metric is not None]
        self.trials_done = len(ran)
        self.trials = max(self.trials or 0, len(ran))
        if complete:
            best = max(complete, key=lambda record: (record.val_metric, -record.size_bytes))
            self.best = champion or best
            self.trial_seconds = mean_trial_seconds(complete)

    def seconds_left(self, now: float) -> float | None:
        """Estimated seconds to the end of the task; None while no trial is complete, or if the fit
        takes longer than a trial did.
        """
        fit_seconds = None if self.trial_seconds is None else self.trial_seconds * self.fit_ratio
        if self.stage == "fit" and fit_seconds is not None:
            return left if (left := fit_seconds - (now - self.entered)) > 0 else None
        searching = (
            remaining_seconds(self.units_done, self.units_left, now - self.entered)
            if self.stage == "search"
            else None
        )
        return None if searching is None or fit_seconds is None else searching + fit_seconds

    def _usage(self) -> dict[str, Any]:
        """How fast the last trial was, and what it took of its GPU."""
        if self.last is None:
            return {}
        usage = {name: getattr(self.last, name) for name in USAGE_FIELDS}
        return {"images_per_second": self.last.images_per_second(self.samples), **usage}

    def state(self, now: float) -> TaskState:
        """Convert to a `TaskState`."""
        left = self.seconds_left(now)
        return TaskState(
            task=self.name,
            stage=self.stage,
            seconds=round(now - self.entered, 1) if self.entered else 0.0,
            trials_done=self.trials_done,
            trials_running=self.trials_running,
            trials=self.trials,
            val_metric=self.best.val_metric if self.best is not None else None,
            size_bytes=self.best.size_bytes if self.best is not None else None,
            seconds_left=None if left is None else round(left, 1),
            remark=self.remark,
            **self._usage(),
        )
