"""Ray Tune's callbacks: the next trial, whether a trial continues, and whether to end the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from pipeline import errors
from pipeline.cluster.rank_group import WORKER_DIED
from pipeline.errors import TaskpackError, TrainingError, UnexpectedError, WorkerDied
from pipeline.search.study import OnRecord, Study
from pipeline.search.time_limit import SearchTime
from pipeline.search.trial_record import USAGE_FIELDS


class StudySearcher(Searcher):
    """Give Tune the study's trials and record their outcomes. `fatal` is an error that every other
    trial would meet.

    Args:
        context: added to every trial's config, because Tune shares the trainable between studies.
        search_time: which trials the time limit leaves room for.
        is_stopping: whether trials end because the run was interrupted.
        most_running: how many trials may run now; Tune asks ten times a second.
    """

    def __init__(
        self,
        study: Study,
        first: int,
        on_progress: OnRecord,
        context: Mapping[str, Any],
        search_time: SearchTime,
        is_stopping: Callable[[], bool],
        most_running: Callable[[], float] = lambda: math.inf,
    ) -> None:
        super().__init__(metric="metric", mode="max")
        self.fatal: TaskpackError | None = None
        self._study, self._on_progress = study, on_progress
        self._context, self._is_stopping = context, is_stopping
        self._search_time, self._most_running = search_time, most_running
        self._next: int | None = first
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.fatal is not None or not self._search_time.may_start(self._study):
            return Searcher.FINISHED
        if self._running() >= self._most_running():
            return None
        number = self._next if self._next is not None else self._study.next_trial()
        self._next = None
        if number is None:
            return Searcher.FINISHED if self._study.is_exhausted else None
        self._numbers[trial_id] = number
        self._search_time.begin(number)
        self._on_progress(self._study)
        proposal = self._study.proposals[number]
        return {
            **self._context,
            "number": number,
            "recipe": proposal.recipe.model_dump_json(),
            "kept": str(self._study.kept(number)),
        }

    def _running(self) -> int:
        return sum(not self._study.has_ended(number) for number in self._numbers.values())

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._on_progress(self._study)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if self._is_stopping() or self._search_time.is_cut:
            return
        try:
            self._take(trial_id, result or {}, error)
        except TaskpackError as fault:  # a full disk: Tune would blame the trial and run it again
            self.fatal = self.fatal or fault
        self._on_progress(self._study)

    def _take(self, trial_id: str, result: dict[str, Any], error: bool) -> None:
        number, seconds = self._numbers[trial_id], float(result.get("time_total_s", 0.0))
        if error:
            self._study.finish(number, seconds, WorkerDied(WORKER_DIED))
        elif "error" in result:
            fault = getattr(errors, result["error"])(result["message"])
            if isinstance(fault, UnexpectedError):
                fault.details = result["details"]
            if not isinstance(fault, TrainingError | UnexpectedError):
                self.fatal = self.fatal or fault
            self._study.finish(number, seconds, fault)
        else:
            usage = {name: result.get(name) for name in USAGE_FIELDS}
            self._study.finish(number, seconds, None, remark=result.get("remark", ""), usage=usage)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing: Tune would do so to resume, but a study resumes from its records."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study's records are kept by the journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the study's records are kept by the journal."""


class StoppingScheduler(FIFOScheduler):
    """Run trials in order, and stop those that the study gives up."""

    def __init__(self, study: Study, search_time: SearchTime) -> None:
        super().__init__()
        self._study, self._search_time = study, search_time

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "error" in result or "epoch" not in result:
            return TrialScheduler.CONTINUE
        number, epoch = trial.config["number"], result["epoch"]
        self._search_time.report(number, epoch, float(result["time_total_s"]))
        goes_on = self._study.report(number, epoch, result["metric"], result["standard_error"])
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def __getstate__(self) -> dict[str, Any]:
        """See `StudySearcher.__getstate__`."""
        return {}


class WhenOver(Stopper):
    """End all trials of a study once `is_over()` is true: interrupted, or out of time."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._is_over()

    def __getstate__(self) -> dict[str, Any]:
        """See `StudySearcher.__getstate__`."""
        return {}
