"""What the nodes of a cluster hold, and waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.cluster.tasks import first_ended, release, reserve
from pipeline.errors import ClusterError

_NODE_SECONDS = 1200  # a GPU machine that pulls a large image takes its time


@dataclass(frozen=True)
class Node:
    """What a node has, taken or not."""

    cpus: float
    gpus: float

    def places(self, cpus: float, gpus: float) -> int:
        """How many workers of so many CPUs and GPUs it holds."""
        rooms = [int(has / asked + 1e-6) for has, asked in ((self.cpus, cpus), (self.gpus, gpus)) if asked]
        return min(rooms, default=0)


def running_nodes() -> list[Node]:
    """The nodes that the cluster has now."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(each.get("CPU", 0), each.get("GPU", 0)) for each in resources]


def has_gpus() -> bool:
    """Whether the cluster has GPUs now."""
    return any(node.gpus for node in running_nodes())


def places(cpus: float, gpus: float) -> int:
    """How many workers of so many CPUs and GPUs the cluster's nodes hold now."""
    return sum(node.places(cpus, gpus) for node in running_nodes())


def check_holds_group(workers: int, cpus: float, gpus: float) -> None:
    """Raise ClusterError where the cluster cannot hold `workers` at once, unless it scales itself: Ray would wait for an hour."""
    held = places(cpus, gpus)
    if workers > held and not _scales_itself():
        raise ClusterError(f"--selection-workers: given {workers}, the cluster has room for {held}, each with a CPU{' and a GPU' if gpus else ''}")


def wait_for_room(ranks: int, cpus: float, gpus: float, is_stopping: Callable[[], bool]) -> None:
    """Return when the cluster has nodes for `ranks` workers of `cpus` and `gpus` at once: now, or, where it scales itself, when it has started them.

    What asks for nodes is gone once this process has ended.

    Raises:
        ClusterError: they are not there, and do not come: Ray would wait for ever.
        Interrupted: `is_stopping` came to hold first.
    """
    if places(cpus, gpus) >= ranks:
        return
    waited = ""
    if _scales_itself():
        if _nodes_came(ranks, cpus, gpus, is_stopping):
            return
        waited = f", and the autoscaler brought none in {_NODE_SECONDS // 60} minutes"
    had = ", ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in running_nodes())
    asked = f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs"
    options = "--cpus-per-trial or --gpus-per-trial"
    if ranks == 1:
        raise ClusterError(f"{asked}, which no node has ({had}){waited}; lower {options}")
    raise ClusterError(
        f"{asked} for each of {ranks} ranks, and the nodes ({had}) have room for {places(cpus, gpus)}{waited}; lower --ranks-per-trial, {options}"
    )


def _nodes_came(ranks: int, cpus: float, gpus: float, is_stopping: Callable[[], bool]) -> bool:
    asking = reserve(ranks, cpus, gpus)
    try:
        return first_ended([asking.ready()], is_stopping, timeout_seconds=_NODE_SECONDS) is not None
    finally:
        release(asking)


def _scales_itself() -> bool:
    """Whether the cluster was started with Ray's autoscaler (its second version), as KubeRay and `ray up` start it."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return is_autoscaler_v2(fetch_from_server=True)
