"""The time limit of a run: how many trials of a study fit in it, so that the champion can still be
fitted.

A time limit decides how many trials of a study run, never which: the sequence of proposals does not
depend on it, and a trial that is ended for lack of time leaves no record. So a later run continues
as if there had been no limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from pipeline.errors import SpecError, TimeLimitError
from pipeline.search.study import Study
from pipeline.search.trial_record import TrialRecord
from pipeline.utils.durations import duration

FINISH_SECONDS = 15.0
"""Reserved in addition to a fit for starting its worker, drawing the front, and registering."""
FIT_SHARE = 0.5
"""Fraction of a fit's expected time that must be left for the fit to begin."""


def _about(seconds: float) -> str:
    return duration(seconds, minutes_from=600)  # to be compared with each other


def mean_trial_seconds(records: Iterable[TrialRecord]) -> float | None:
    """How long a complete trial took on average; None while none is complete."""
    seconds = [record.seconds for record in records if record.state == "complete"]
    return sum(seconds) / len(seconds) if seconds else None


def projected_seconds(elapsed: Sequence[float], epochs: int) -> float | None:
    """How long a trial of `epochs` takes, from the seconds that had elapsed after each epoch so
    far.

    None before the second epoch: the first one includes opening the data and the backbone.
    """
    if len(elapsed) < 2:
        return None
    pace = (elapsed[-1] - elapsed[0]) / (len(elapsed) - 1)
    return elapsed[-1] + pace * (epochs - len(elapsed))


class TimeLimit:
    """The wall-clock limit of a run over all its tasks, counted from when this is created.
    Thread-safe.

    `places` is the number of fits that can run concurrently.

    Args:
        seconds: infinite for no limit.

    Raises:
        SpecError: `seconds` is not a positive number.
    """

    def __init__(
        self, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not seconds > 0:
            raise SpecError(f"time_limit_seconds: given {seconds:g}, expected a number above 0")
        self.seconds, self.places = seconds, 1
        self.now = clock
        self._end = clock() + seconds
        self._fits: dict[str, float] = {}

    @property
    def exists(self) -> bool:
        """Whether there is a limit."""
        return self.seconds < math.inf

    def seconds_left(self) -> float:
        """Seconds until the end of the run; negative afterwards."""
        return self._end - self.now()

    def is_over(self) -> bool:
        """Whether no time is left."""
        return self.seconds_left() <= 0

    def expect_fit(self, task: str, seconds: float) -> None:
        """Reserve the expected time of a task's fit."""
        self._fits[task] = seconds

    def release(self, task: str) -> None:
        """Reserve nothing for a task that has ended."""
        self._fits.pop(task, None)

    def reserved_seconds(self) -> float:
        """Time to reserve for the fits of all tasks that search now: Graham's bound for any order
        in which they get their places (SIAM J. Appl. Math. 17, 1969), and `FINISH_SECONDS`.
        """
        fits = tuple(self._fits.values())
        longest = max(fits, default=0.0)
        return longest + (sum(fits) - longest) / self.places + FINISH_SECONDS

    def over(self, task: str, stage: str) -> TimeLimitError:
        """The error of a task whose time was over in a stage before the search."""
        return TimeLimitError(
            f"{task}: the time limit of {_about(self.seconds)} was over in {stage}; the"
            " same command with a longer --time-limit, or none, continues"
        )

    def check_can_begin(self, task: str) -> None:
        """Raise TimeLimitError if no time is left for a task that has not begun."""
        if self.is_over():
            raise TimeLimitError(
                f"{task}: not begun within the time limit of {_about(self.seconds)}; the same"
                " command with a longer --time-limit, or none, continues"
            )


class SearchTime:
    """The trials of one study that fit in the time limit.

    `is_cut` tells whether the limit has ended the search, `trials_left` how many planned trials
    have then not run.

    Args:
        fit_ratio: duration of a fit relative to a trial's: the ratio of their samples.
    """

    def __init__(self, limit: TimeLimit, task: str, fit_ratio: float = 1.0) -> None:
        self.is_cut, self.trials_left = False, 0
        self._limit, self._task, self._fit_ratio = limit, task, fit_ratio
        self._began: dict[int, float] = {}
        self._elapsed: dict[int, list[float]] = {}

    def begin(self, number: int) -> None:
        """Take note that a trial may start."""
        self._began[number] = self._limit.now()

    def report(self, number: int, epoch: int, elapsed_seconds: float) -> None:
        """Take note that a trial has finished an epoch (counted from 1) after `elapsed_seconds`."""
        self._began[number] = self._limit.now() - elapsed_seconds
        self._elapsed[number] = [*self._elapsed.get(number, [])[: epoch - 1], elapsed_seconds]

    def may_start(self, study: Study) -> bool:
        """Whether a trial that starts now is expected to end early enough for a fit."""
        expected = mean_trial_seconds(study.outcomes())
        if not self._limit.exists or expected is None:
            return not self._limit.is_over()
        return expected + self._reserve(expected) <= self._limit.seconds_left()

    def is_over(self, study: Study) -> bool:
        """Whether to end the search: no further trial fits, and no running one is expected to end
        in time. Once true, it stays true.

        Without a complete trial the search goes on as long as the first one can be expected to
        leave `FIT_SHARE` of its fit's time.
        """
        if self._limit.exists and not self.is_cut:
            running = [number for number in self._began if not study.has_ended(number)]
            paced = [number for number in running if self._projected(study, number) is not None]
            fits = any(self._ends_in_time(study, number) for number in paced or running)
            none_complete = mean_trial_seconds(study.outcomes()) is None
            self.is_cut = not fits and (
                (none_complete and bool(running)) or not self.may_start(study)
            )
        return self.is_cut

    def close(self, study: Study) -> None:
        """Count the planned trials that the limit has left out, after the search."""
        study.close()
        if self._limit.exists and (
            study.next_trial() is not None or len(study.proposals) > len(study.records)
        ):
            self.is_cut = True
            self.trials_left = study.trials_planned() - len(study.records)

    def _ends_in_time(self, study: Study, number: int) -> bool:
        mean = mean_trial_seconds(study.outcomes())
        expected = self._projected(study, number)
        expected = mean if expected is None else expected
        if expected is None:
            return not self._limit.is_over()
        rest = max(0.0, self._began[number] + expected - self._limit.now())
        needed = FIT_SHARE * expected * self._fit_ratio if mean is None else self._reserve(mean)
        return rest + needed <= self._limit.seconds_left()

    def _projected(self, study: Study, number: int) -> float | None:
        return projected_seconds(
            self._elapsed.get(number, ()), study.proposals[number].recipe.training.epochs
        )

    def _reserve(self, trial_seconds: float) -> float:
        self._limit.expect_fit(self._task, trial_seconds * self._fit_ratio)
        return self._limit.reserved_seconds()

    def too_short(self, study: Study) -> TimeLimitError:
        """The error of a study whose search the limit has ended before a trial was complete."""
        projections = [self._projected(study, number) for number in self._elapsed]
        known = [seconds for seconds in projections if seconds is not None]
        took = (
            f"a trial takes about {_about(min(known))} here and its fit about"
            f" {_about(min(known) * self._fit_ratio)}"
            if known
            else "none had finished two epochs"
        )
        return TimeLimitError(
            f"{self._task}: the time limit of {_about(self._limit.seconds)} is too short: no trial"
            f" was complete {_about(max(0.0, self._limit.seconds_left()))} before its end, and"
            f" {took}. Give a longer --time-limit, or fewer epochs (recipe.training.epochs)"
        )

    def check_fit(self, records: Sequence[TrialRecord]) -> None:
        """Raise TimeLimitError if the time left is clearly too short for the champion's fit."""
        trial_seconds = mean_trial_seconds(records)
        assert trial_seconds is not None, "a study ends with a complete trial or an error"
        fit_seconds, left = trial_seconds * self._fit_ratio, self._limit.seconds_left()
        if left < FIT_SHARE * fit_seconds:
            raise TimeLimitError(
                f"{self._task}: the time limit of {_about(self._limit.seconds)} is too short: a"
                f" trial takes about {_about(trial_seconds)} here, its fit about"
                f" {_about(fit_seconds)}, and {_about(max(0.0, left))} were left for it. The"
                " trials are kept: give a longer --time-limit, or none, to fit their champion"
            )
