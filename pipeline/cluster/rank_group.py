"""A trial or a fit as one or several processes: their resources, and how the further ones are
started, joined and ended.

The resources of a group are one Ray placement group, allocated at once or not at all. The process
that Ray started is the first rank; it starts the others in the placement group, and they train
together (see `Ranks`). If any of them dies, the first raises `RanksLost`, and the whole group
starts again.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import TaskpackError, named
from pipeline.training.ranks import ALONE, Ranks, RanksLost, answered

_LOOK_SECONDS = 0.2
_START_SECONDS = 300
"""Seconds for the other ranks to start; their resources are allocated already."""
_SILENCE_SECONDS = 600
"""Seconds of silence after which a rank counts as lost. A dead process is noticed at once; this is
for a machine that vanished.
"""
_END_SECONDS = 15

Outcome = TypeVar("Outcome")

WORKER_RETRIES = 5
"""How often a trial or a fit is retried when its worker dies: a long one on preemptible machines
may be preempted more than once.
"""
WORKER_DIED = f"its worker died more than {WORKER_RETRIES} times"


@dataclass(frozen=True)
class TrialResources:
    """The resources of each trial: its number of processes, and CPUs and GPUs of each. `gpus` may
    be a fraction for a single process.
    """

    cpus: float = 1
    gpus: float = 0
    ranks: int = 1

    @property
    def threads(self) -> int:
        """How many threads a process computes with, and decodes images with."""
        return max(1, int(self.cpus))

    def device(self) -> str:
        """The device of a process. (Ray shows every GPU of a node to a process that requested
        none.)

        Raises:
            ClusterError: It was given a GPU that torch cannot use.
        """
        from pipeline.utils.devices import reserved_gpu

        return reserved_gpu() if self.gpus else "cpu"


def in_group(
    work: Callable[..., Outcome], arguments: Sequence[Any], resources: TrialResources
) -> Outcome | TaskpackError:
    """Run `work(*arguments, resources, ranks)` on every rank of a trial and return the result of
    this one, the first.

    An exception is returned as a named error, because a retry would not help while all workers are
    alive.

    Raises:
        RanksLost: Another rank died.
    """
    try:
        with group(work, arguments, resources) as ranks:
            return work(*arguments, resources, ranks)
    except RanksLost:
        raise
    except Exception as error:
        return named(error)


def on_ranks(work: Callable[..., Outcome]) -> Callable[..., Outcome | TaskpackError]:
    """A function for a Ray task: given `(*arguments, resources)`, it does
    `in_group(work, arguments, resources)`.
    """

    @functools.wraps(work)
    def worker(*given: Any) -> Outcome | TaskpackError:
        *arguments, resources = given
        return in_group(work, arguments, resources)

    del worker.__wrapped__  # Ray would look there and ask for `ranks`
    return worker


@contextlib.contextmanager
def group(
    follow: Callable[..., Any], arguments: Sequence[Any], resources: TrialResources
) -> Iterator[Ranks]:
    """A context with the ranks of a trial, of which this process is the first; the others run
    `follow(*arguments, resources, ranks)`.

    Raises:
        TaskpackError: Another rank failed with this error.
        RanksLost: Another rank died.
    """
    _set_limits(resources)
    if resources.ranks == 1:
        yield ALONE
        return
    import ray
    import torch.distributed as dist

    store = dist.TCPStore(ray.util.get_node_ip_address(), 0, is_master=True, wait_for_workers=False)
    others = _start_others(follow, arguments, resources, (store.host, store.port))
    try:
        _await_start(store, others, resources.ranks)
        yield _join(store, Ranks(0, resources.ranks))
        ray.wait(others, num_returns=len(others), timeout=_END_SECONDS)
    except RanksLost as lost:
        raise _cause_of_loss(others) or lost from None
    finally:
        _leave()
        for each in others:
            ray.cancel(each, force=True)


def _set_limits(resources: TrialResources) -> None:
    import torch

    from pipeline.utils.devices import limit_memory

    torch.set_num_threads(resources.threads)
    if 0 < resources.gpus < 1:
        limit_memory(resources.device(), resources.gpus)


def _start_others(
    follow: Callable[..., Any],
    arguments: Sequence[Any],
    resources: TrialResources,
    meeting: tuple[str, int],
) -> list[Any]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    places = ray.util.get_current_placement_group()
    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(_other)
    strategies = [
        PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=rank)
        for rank in range(1, resources.ranks)
    ]
    return [
        remote.options(scheduling_strategy=strategy).remote(
            follow, arguments, resources, rank, meeting
        )
        for rank, strategy in enumerate(strategies, start=1)
    ]


def _other(
    follow: Callable[..., Any],
    arguments: Sequence[Any],
    resources: TrialResources,
    rank: int,
    meeting: tuple[str, int],
) -> Any:
    """Run a rank that is not the first. Its own error is returned rather than raised, so that Ray
    does not wrap it.
    """
    import torch.distributed as dist

    _set_limits(resources)
    store = dist.TCPStore(*meeting, is_master=False)
    store.set(_started(rank), "")
    try:
        follow(*arguments, resources, _join(store, Ranks(rank, resources.ranks)))
    except RanksLost:
        raise
    except Exception as error:
        return named(error)
    finally:
        _leave()
    return None


def _started(rank: int) -> str:
    return f"started {rank}"


def _await_start(store: Any, others: Sequence[Any], world: int) -> None:
    """Wait until all others have started. Raises RanksLost if one ends before, or if they take too
    long.
    """
    import ray

    deadline = time.monotonic() + _START_SECONDS
    while not store.check([_started(rank) for rank in range(1, world)]):
        ended, _ = ray.wait(list(others), timeout=_LOOK_SECONDS)
        if ended:
            raise RanksLost("a rank ended before it had begun")
        if time.monotonic() > deadline:
            raise RanksLost("a rank did not start")


def _join(store: Any, ranks: Ranks) -> Ranks:
    """Enter the process group that the ranks use."""
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=_SILENCE_SECONDS)
    with answered():
        dist.init_process_group(
            "gloo", store=store, rank=ranks.rank, world_size=ranks.world, timeout=timeout
        )
    return ranks


def _leave() -> None:
    """Leave the process group, which interrupts the others in any wait."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _cause_of_loss(others: Sequence[Any]) -> Exception | None:
    """Why ranks no longer answer: the named error of one of them, or RanksLost. None if all of them
    are running.
    """
    import ray

    ended, _ = ray.wait(list(others), num_returns=len(others), timeout=_END_SECONDS)
    lost: Exception | None = None
    for each in ended:
        try:
            outcome = ray.get(each)
        except ray.exceptions.RayError as error:
            lost = RanksLost(
                f"a rank is lost: {(str(error).strip().splitlines() or [''])[-1][:200]}"
            )
        else:
            if outcome is not None:
                return outcome
    return lost
