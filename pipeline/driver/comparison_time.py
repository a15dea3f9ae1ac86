"""The trials of a comparison that its time limit leaves room for.

Whenever the limit ends them, every method has tried about the same share of its space, so that no
method is favoured, and the fits of all methods and seeds still fit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.search.time_limit import TimeLimit, mean_trial_seconds
from pipeline.search.trial_record import TrialRecord


def in_turn(counts: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """The trials of methods with so many each, as (method, number of its trial): at any time, about
    the same share of each method's. A method's are in an order of the seed, because the neighbours
    in a space are alike.
    """
    turns = []
    for method, count in enumerate(counts):
        order = list(range(count))
        random.Random(seed).shuffle(order)
        turns += [(turn / count, method, number) for turn, number in enumerate(order)]
    return [(method, number) for _, method, number in sorted(turns)]


@dataclass(frozen=True)
class ComparisonTime:
    """What may start on one task.

    Args:
        fits: how many fits follow the trials.
        fit_ratio: duration of a fit relative to a trial's: the ratio of their samples.
    """

    limit: TimeLimit
    task: str
    fits: int
    fit_ratio: float

    def startable(self, waiting: int, records: Iterable[TrialRecord], at_once: int) -> int:
        """How many of the waiting trials may start now: all of them without a limit, otherwise as
        many as can run at the same time, if they and the fits are expected to end in time. Until a
        trial is complete, its duration is unknown, and they start as long as time is left.
        """
        if not self.limit.exists:
            return waiting
        seconds = mean_trial_seconds(records)
        if seconds is None:
            return 0 if self.limit.is_over() else min(waiting, at_once)
        rounds = math.ceil(self.fits / at_once)
        self.limit.expect_fit(self.task, rounds * seconds * self.fit_ratio)
        fits_in = seconds + self.limit.reserved_seconds() <= self.limit.seconds_left()
        return min(waiting, at_once) if fits_in else 0
