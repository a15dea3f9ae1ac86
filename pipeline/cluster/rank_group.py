"""A trial or a fit as one process or several: what each is given, and how the others are started, met and ended.

All places of a group are one placement group of Ray, had at once or not at all. Its first process is the one that Ray was asked for; it starts the
others beside it, and they train together (see `Ranks`). Whichever of them dies, the first raises `RanksLost`, and the whole group starts again.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import TaskpackError, named
from pipeline.training.ranks import ALONE, Ranks, RanksLost, answered

_LOOK_SECONDS = 0.2
_START_SECONDS = 300
"""How long the others may take to start. Their places are there already."""
_SILENCE_SECONDS = 600
"""After how long without a word from another rank it is given up. A dead process is noticed at once; this is for a machine that vanished."""
_END_SECONDS = 15

Outcome = TypeVar("Outcome")

WORKER_RETRIES = 5
"""How often a trial or a fit starts again when its worker dies: machines that may be taken away are, and a long one meets that more than once."""
WORKER_DIED = f"its worker died more than {WORKER_RETRIES} times"


@dataclass(frozen=True)
class TrialResources:
    """What each trial is given: so many processes, each with so many CPUs and GPUs. `gpus` of a single one may be a fraction."""

    cpus: float = 1
    gpus: float = 0
    ranks: int = 1

    @property
    def threads(self) -> int:
        """That a process computes with."""
        return max(1, int(self.cpus))

    def device(self) -> str:
        """Where a process computes. Ray shows every GPU of a node to a process that asked for none.

        Raises:
            ClusterError: it was given a GPU that torch cannot use.
        """
        from pipeline.utils.devices import reserved_gpu

        return reserved_gpu() if self.gpus else "cpu"


def in_group(work: Callable[..., Outcome], arguments: Sequence[Any], resources: TrialResources) -> Outcome | TaskpackError:
    """`work(*arguments, resources, ranks)` on every rank of a trial; what it gives on this one, the first.

    An exception is returned as a named error: as long as all workers live, nothing would be different the next time.

    Raises:
        RanksLost: another rank died.
    """
    try:
        with group(work, arguments, resources) as ranks:
            return work(*arguments, resources, ranks)
    except RanksLost:
        raise
    except Exception as error:
        return named(error)


@contextlib.contextmanager
def group(follow: Callable[..., Any], arguments: Sequence[Any], resources: TrialResources) -> Iterator[Ranks]:
    """The ranks of a trial, of which this process is the first; the others run `follow(*arguments, resources, ranks)` as long as this lasts.

    Raises:
        TaskpackError: what another rank ended with.
        RanksLost: another rank died.
    """
    _set_threads(resources)
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
        raise _what_befell(others) or lost from None
    finally:
        _leave()
        for each in others:
            ray.cancel(each, force=True)


def _set_threads(resources: TrialResources) -> None:
    import torch

    torch.set_num_threads(resources.threads)


def _start_others(follow: Callable[..., Any], arguments: Sequence[Any], resources: TrialResources, meeting: tuple[str, int]) -> list[Any]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    places = ray.util.get_current_placement_group()
    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(_other)
    strategies = [PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=rank) for rank in range(1, resources.ranks)]
    return [
        remote.options(scheduling_strategy=strategy).remote(follow, arguments, resources, rank, meeting)
        for rank, strategy in enumerate(strategies, start=1)
    ]


def _other(follow: Callable[..., Any], arguments: Sequence[Any], resources: TrialResources, rank: int, meeting: tuple[str, int]) -> Any:
    """A rank that is not the first. What it fails of by itself is returned, so that it arrives as what it is."""
    import torch.distributed as dist

    _set_threads(resources)
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
    """Return when all others have started. Raises RanksLost where one ends before, or where they take too long."""
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
        dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world, timeout=timeout)
    return ranks


def _leave() -> None:
    """Leave the process group, which tells the others, whatever they wait for."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _what_befell(others: Sequence[Any]) -> Exception | None:
    """Why ranks no longer answer: the named error that one of them ended with, or that one is lost. None where all of them go on."""
    import ray

    ended, _ = ray.wait(list(others), num_returns=len(others), timeout=_END_SECONDS)
    lost: Exception | None = None
    for each in ended:
        try:
            outcome = ray.get(each)
        except ray.exceptions.RayError as error:
            lost = RanksLost(f"a rank is lost: {(str(error).strip().splitlines() or [''])[-1][:200]}")
        else:
            if outcome is not None:
                return outcome
    return lost
