"""A batch played with given costs: discrete events, one GPU a trial, one driver that serves every
event in turn.

A study that learns has at most `LAG` trials in flight, and number i starts once the slots up to i -
LAG have ended. The trials of an enumerated space need not wait: as many are in flight as the GPUs
that fall to a study, and some more, but at least LAG. A trial trains an epoch on its GPU,
reports, and goes on when the driver has taken the result: Tune lets it wait. The driver takes one
event at a time, in the order in which they come; what its threads spend on polling slows all of it
down. Registrations follow each other.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.driver.stages import SLACK
from pipeline.search.proposer import LAG


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of the driver for a result, a trial, a study's begin and end; shares of it that
    polling a study and writing the state take; seconds of the registry for a pack, and of a worker
    for coding the positions of a selection."""

    result: float
    trial: float
    study: float
    study_end: float
    silent_share: float
    state_share: float
    registration: float
    coding: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A batch of studies that learn, or enumerate their spaces. Trials take `trial_seconds` of
    GPU, some a fifth more or less; a selection takes as long as three epochs, a fit a quarter more
    than a trial; a worker that starts takes `start_seconds` to load its programs, backbone and
    images.
    """

    tasks: int
    trials: int
    gpus: int
    studies: int
    trial_seconds: float
    learns: bool = True
    epochs: int = 30
    start_seconds: float = 20.0
    spread: float = 0.2


@dataclass
class Server:
    """Serves one after another. `wait` is the time spent in the queue."""

    free_at: float = 0.0
    busy: float = 0.0
    served: int = 0
    wait: float = 0.0
    longest_wait: float = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """When what comes `now` and takes `seconds` is done."""
        begun = max(now, self.free_at)
        self.wait += begun - now
        self.longest_wait = max(self.longest_wait, begun - now)
        self.free_at = begun + seconds
        self.busy += seconds
        self.served += 1
        return self.free_at


@dataclass(eq=False)
class _Study:
    next_trial: int = 0
    ended: set[int] = field(default_factory=set)
    in_flight: int = 0
    idle_workers: int = 0


class _Batch:
    """The state of a simulation; `_at` plans a call."""

    def __init__(self, plan: Plan, costs: Costs) -> None:
        self.plan, self.costs = plan, costs
        self.driver, self.registry = Server(), Server()
        self.now, self.gpu_busy, self.gpu_held, self.results = 0.0, 0.0, 0.0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._free_gpus = plan.gpus
        self._waiting: deque[Callable[[], None]] = deque()
        self._to_start, self._running = plan.tasks, 0
        self._searching: list[_Study] = []
        self._random = random.Random(0)
        self._slowdown = 1 / max(
            1e-9, 1 - min(0.999, plan.studies * costs.silent_share + costs.state_share)
        )

    def run(self) -> None:
        for _ in range(min(self.plan.studies, self.plan.tasks)):
            self._start_study()
        while self._events:
            now, _, call = heapq.heappop(self._events)
            self.gpu_held += (now - self.now) * (self.plan.gpus - self._free_gpus)
            self.now = now
            call()

    def _at(self, time: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, call))

    def _on_driver(self, seconds: float, call: Callable[[], None]) -> None:
        self._at(self.driver.serve(self.now, seconds * self._slowdown), call)

    def _on_gpu(self, call: Callable[[], None]) -> None:
        """Call with a GPU taken, as soon as one is free."""
        if self._free_gpus:
            self._free_gpus -= 1
            call()
        else:
            self._waiting.append(call)

    def _release(self) -> None:
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._free_gpus += 1

    def _compute(self, seconds: float, call: Callable[[], None]) -> None:
        self.gpu_busy += seconds
        self._at(self.now + seconds, call)

    def _start_study(self) -> None:
        if self._to_start == 0:
            return
        self._to_start -= 1
        self._running += 1
        study, plan = _Study(), self.plan
        selecting = plan.start_seconds + 3 * plan.trial_seconds / plan.epochs
        self._on_driver(
            self.costs.study,
            lambda: self._on_gpu(lambda: self._compute(selecting, lambda: self._selected(study))),
        )

    def _selected(self, study: _Study) -> None:
        self._release()
        self._searching.append(study)
        self._at(self.now + self.costs.coding, lambda: self._start_trials(study))

    def _may_start(self, study: _Study) -> bool:
        if study.next_trial == self.plan.trials:
            return False
        if self.plan.learns:
            return all(number in study.ended for number in range(study.next_trial - LAG + 1))
        return study.in_flight < max(LAG, math.ceil(SLACK * self.plan.gpus / self._running))

    def _start_trials(self, study: _Study) -> None:
        while self._may_start(study):
            number = study.next_trial
            study.next_trial += 1
            study.in_flight += 1
            self._on_driver(
                self.costs.trial,
                lambda number=number: self._on_gpu(lambda: self._begin(study, number)),  # type: ignore[misc]
            )

    def _begin(self, study: _Study, number: int) -> None:
        """A trial on a GPU, by a worker that has none, or by a new one."""
        epoch_seconds = (
            self.plan.trial_seconds
            / self.plan.epochs
            * self._random.uniform(1 - self.plan.spread, 1 + self.plan.spread)
        )
        is_new = study.idle_workers == 0
        study.idle_workers -= not is_new
        self._at(
            self.now + (self.plan.start_seconds if is_new else 0.0),
            lambda: self._epoch(study, number, self.plan.epochs, epoch_seconds),
        )

    def _epoch(self, study: _Study, number: int, left: int, seconds: float) -> None:
        if left:
            self._compute(seconds, lambda: self._report(study, number, left - 1, seconds))
            return
        self._release()
        study.ended.add(number)
        study.in_flight -= 1
        study.idle_workers += 1
        self._start_trials(study)
        if study.in_flight == 0 and study.next_trial == self.plan.trials:
            self._searching.remove(study)
            self._fit()

    def _report(self, study: _Study, number: int, left: int, seconds: float) -> None:
        self.results += 1
        self._on_driver(self.costs.result, lambda: self._epoch(study, number, left, seconds))

    def _fit(self) -> None:
        seconds = self.plan.start_seconds + 1.25 * self.plan.trial_seconds
        self._on_driver(
            self.costs.study_end, lambda: self._on_gpu(lambda: self._compute(seconds, self._fitted))
        )

    def _fitted(self) -> None:
        self._release()
        self._running -= 1
        for study in self._searching:  # more of the cluster falls to each
            self._start_trials(study)
        self._at(self.registry.serve(self.now, self.costs.registration), self._start_study)


def simulate(plan: Plan, costs: Costs) -> dict[str, Any]:
    """Play the batch to its end: how long it takes and how busy GPUs, driver and registry are."""
    batch = _Batch(plan, costs)
    batch.run()
    polling = plan.studies * costs.silent_share + costs.state_share
    return {
        "studies": plan.studies,
        "trial_seconds": plan.trial_seconds,
        "hours": batch.now / 3600,
        "space": "sampled" if plan.learns else "enumerated",
        "gpus": plan.gpus,
        "tasks": plan.tasks,
        "held_share": batch.gpu_held / (batch.now * plan.gpus),
        "gpu_share": batch.gpu_busy / (batch.now * plan.gpus),
        "driver_share": min(1.0, polling + batch.driver.busy * (1 - min(1.0, polling)) / batch.now),
        "results_a_second": batch.results / batch.now,
        "mean_wait_seconds": batch.driver.wait / batch.driver.served,
        "max_wait_seconds": batch.driver.longest_wait,
        "registry_share": batch.registry.busy / batch.now,
    }
