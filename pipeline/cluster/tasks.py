"""Ray tasks that are retried when their workers die, and the resources they take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.cluster.task_pool import Interrupted
from pipeline.errors import TaskpackError, named

_LOOK_SECONDS = 0.5


def first_ended(
    running: Sequence[Any], is_stopping: Callable[[], bool], timeout_seconds: float = math.inf
) -> Any:
    """The first of these Ray tasks to end, or None if none does in time. Raises Interrupted if
    `is_stopping()` becomes true first.
    """
    import ray

    deadline = time.monotonic() + timeout_seconds
    while not is_stopping():
        ended, _ = ray.wait(list(running), timeout=_LOOK_SECONDS)
        if ended or time.monotonic() > deadline:
            return ended[0] if ended else None
    raise Interrupted


class WorkersDied(Exception):
    """A Ray task has lost its workers in every retry."""


@dataclass
class _Deaths:
    """The deaths of one task since it last made progress."""

    kept: Callable[[], object]
    count: int = 0
    _before: object = field(init=False)

    def __post_init__(self) -> None:
        self._before = self.kept()

    def one_more(self) -> int:
        """The number of running tasks."""
        now = self.kept()
        self.count = self.count + 1 if now == self._before else 0
        self._before = now
        return self.count


class _Running:
    """The running tasks, each with its index and its placement group."""

    def __init__(
        self, worker: Callable[..., Any], cpus: float, gpus: float, ranks: int, strategy: str
    ) -> None:
        import ray

        # Ray ends a worker after a task with a GPU. `max_calls=0` would keep it, but Ray then gives
        # it whichever GPU is free, and CUDA stays on the first one of a process.
        self._remote = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_retries=0, scheduling_strategy=strategy
        )(worker)
        self._reserve = lambda: reserve(ranks, cpus, gpus) if ranks > 1 else None
        self._tasks: dict[Any, tuple[int, Any]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, index: int, arguments: Sequence[Any]) -> None:
        """Start a task."""
        places = self._reserve()
        self._tasks[self._remote.options(**first_of(places)).remote(*arguments)] = index, places

    def next_ended(self, is_stopping: Callable[[], bool]) -> tuple[int, Any]:
        """The index and the result's reference of the next task that ends; its resources are
        released.
        """
        ended = first_ended(list(self._tasks), is_stopping)
        index, places = self._tasks.pop(ended)
        release(places)
        return index, ended

    def cancel(self) -> None:
        """Cancel what still runs: on a shared Ray, it would outlive this process."""
        import ray

        for task, (_, places) in self._tasks.items():
            ray.cancel(task, force=True)
            release(places)


def ended_tasks(
    worker: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    cpus: float,
    gpus: float,
    *,
    ranks: int = 1,
    retries: int,
    kept: Callable[..., object] = lambda *given: None,
    is_stopping: Callable[[], bool],
    strategy: str = "DEFAULT",
) -> Iterator[tuple[int, Any]]:
    """Run `worker` as a Ray task on every set of arguments; yield (index, outcome) as they end.

    Args:
        ranks: size of the task's placement group in workers, its own included, each with `cpus` and
            `gpus`; allocated at once or not at all.
        retries: retries of a task whose workers or nodes died without progress since the previous
            death. Several workers release their resources before a retry.
        kept: called with a set of arguments; returns a value that changes when its task has made
            progress that a retry can use.
        strategy: Ray's scheduling strategy for tasks of one worker.

    Raises:
        WorkersDied: A task's workers died more often.
        Interrupted: `is_stopping()` became true.
    """
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    from pipeline.training.ranks import RanksLost

    running = _Running(worker, cpus, gpus, ranks, strategy)
    deaths = [_Deaths(partial(kept, *each)) for each in arguments]
    try:
        for index, each in enumerate(arguments):
            running.start(index, each)
        while running:
            index, ended = running.next_ended(is_stopping)
            try:
                outcome = ray.get(ended)
            except (WorkerCrashedError, NodeDiedError, OutOfMemoryError, RanksLost) as error:
                if deaths[index].one_more() > retries:
                    raise WorkersDied from error
                running.start(index, arguments[index])
            else:
                yield index, outcome
    finally:
        running.cancel()


def computed(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    is_stopping: Callable[[], bool],
    *,
    retries: int,
) -> Any:
    """What a function gives, computed by a worker somewhere in the cluster. It waits for no trial
    to end, and should take seconds.

    Args:
        retries: retries after the death of its worker or node.

    Raises:
        TaskpackError: The error of the function, named.
        WorkersDied: Its workers died more often.
        Interrupted: `is_stopping()` became true.
    """
    ((_, outcome),) = ended_tasks(
        _outcome,
        [(function, *arguments)],
        cpus=0,
        gpus=0,
        retries=retries,
        is_stopping=is_stopping,
        strategy="SPREAD",
    )
    if isinstance(outcome, TaskpackError):
        raise outcome
    return outcome


def _outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives, or its named error: as an exception, Ray would change its text."""
    try:
        return function(*arguments)
    except Exception as error:
        return named(error)


def reserve(ranks: int, cpus: float, gpus: float) -> Any:
    """A placement group for this many workers, on as few nodes as possible; it is allocated at once
    or not at all.
    """
    import ray

    return ray.util.placement_group(bundles(ranks, cpus, gpus), strategy="PACK")


def bundles(ranks: int, cpus: float, gpus: float) -> list[dict[str, float]]:
    """The bundles of a placement group for this many workers."""
    return [{"CPU": cpus, **({"GPU": gpus} if gpus else {})}] * ranks


def first_of(places: Any | None) -> dict[str, Any]:
    """Options of a task that takes the first bundle of a placement group, if there is one."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return (
        {}
        if places is None
        else {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                places, placement_group_bundle_index=0
            )
        }
    )


def release(places: Any | None) -> None:
    """Release a placement group, if there is one."""
    import ray

    if places is not None:
        ray.util.remove_placement_group(places)
