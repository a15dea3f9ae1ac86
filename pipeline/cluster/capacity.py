"""The capacity of a cluster's nodes, and waiting for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.cluster.tasks import first_ended, release, reserve
from pipeline.errors import ClusterError

_KIND = "accelerator_type:"
_NODE_SECONDS = 1200  # a GPU machine that pulls a large image takes its time


@dataclass(frozen=True)
class Node:
    """The total resources of a node, and the kind of its GPUs as Ray names it, such as `H100`."""

    cpus: float
    gpus: float
    gpu_kind: str = ""

    def places(self, cpus: float, gpus: float) -> int:
        """How many workers with this many CPUs and GPUs it can hold."""
        rooms = [
            int(has / asked + 1e-6)
            for has, asked in ((self.cpus, cpus), (self.gpus, gpus))
            if asked
        ]
        return min(rooms, default=0)


def running_nodes() -> list[Node]:
    """The nodes of the cluster."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(each.get("CPU", 0), each.get("GPU", 0), _gpu_kind(each)) for each in resources]


def _gpu_kind(resources: Mapping[str, float]) -> str:
    kinds = [name for name in resources if name.startswith(_KIND)]
    return ", ".join(sorted(name.removeprefix(_KIND) for name in kinds))


def has_gpus() -> bool:
    """Whether the cluster has GPUs."""
    return any(node.gpus for node in running_nodes())


def gpu_kinds() -> list[str]:
    """The kinds of the cluster's GPUs; one that Ray does not know is empty."""
    return sorted({node.gpu_kind for node in running_nodes() if node.gpus})


def of_kind(kind: str) -> dict[str, float]:
    """The resources that a Ray task asks for to run on a node with GPUs of a kind of `gpu_kinds`;
    none for a kind that Ray does not know.
    """
    return {f"{_KIND}{kind.split(', ')[0]}": 0.001} if kind else {}


def most_trials_per_gpu(cpus: float | None, trials: int) -> int:
    """How many trials of `cpus` CPUs (None: at least one) may share each GPU of the cluster: no
    more than there are CPUs for on the node with the fewest per GPU, because Ray fills a GPU before
    it uses the next, and no more than divide `trials` evenly between the GPUs. At least one.
    """
    nodes = [node for node in running_nodes() if node.gpus]
    for_cpus = [int(node.cpus / node.gpus / (cpus or 1) + 1e-6) for node in nodes]
    for_trials = math.ceil(trials / max(1, sum(node.gpus for node in nodes)))
    return max(1, min([*for_cpus, for_trials]))


def places(cpus: float, gpus: float) -> int:
    """How many workers with this many CPUs and GPUs the cluster's nodes can hold."""
    return sum(node.places(cpus, gpus) for node in running_nodes())


def cpus_per_trial(gpus: float) -> float:
    """The CPUs of a trial by default: one where it computes on them; otherwise, to decode images
    for its GPUs, those of a node over the trials that its GPUs hold, on the node with the fewest.
    """
    if not gpus:
        return 1
    shares = [node.cpus // node.places(0, gpus) for node in running_nodes() if node.places(0, gpus)]
    return max(1, min(shares, default=1))


def check_holds_group(workers: int, cpus: float, gpus: float) -> None:
    """Raise ClusterError if the cluster cannot hold `workers` at once, unless it autoscales: Ray
    would wait for an hour.
    """
    held = places(cpus, gpus)
    if workers > held and not scales_itself():
        raise ClusterError(
            f"--selection-workers: given {workers}, the cluster has room for {held}, each with"
            f" {cpus:g} CPU{'s' if cpus != 1 else ''}{' and a GPU' if gpus else ''}"
        )


def wait_for_room(ranks: int, cpus: float, gpus: float, is_stopping: Callable[[], bool]) -> None:
    """Wait until the cluster has nodes for `ranks` workers of `cpus` and `gpus` at once; an
    autoscaling cluster starts them.

    The request for nodes ends with this process.

    Raises:
        ClusterError: The nodes are missing and were not started: Ray would wait forever.
        Interrupted: `is_stopping()` became true first.
    """
    if places(cpus, gpus) >= ranks:
        return
    waited = ""
    if scales_itself():
        if _nodes_came(ranks, cpus, gpus, is_stopping):
            return
        waited = f", and the autoscaler brought none in {_NODE_SECONDS // 60} minutes"
    had = ", ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in running_nodes())
    asked = f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs"
    options = "--cpus-per-trial or --gpus-per-trial"
    if ranks == 1:
        raise ClusterError(f"{asked}, which no node has ({had}){waited}; lower {options}")
    raise ClusterError(
        f"{asked} for each of {ranks} ranks, and the nodes ({had}) have room for"
        f" {places(cpus, gpus)}{waited}; lower --ranks-per-trial, {options}"
    )


def _nodes_came(ranks: int, cpus: float, gpus: float, is_stopping: Callable[[], bool]) -> bool:
    asking = reserve(ranks, cpus, gpus)
    try:
        return first_ended([asking.ready()], is_stopping, timeout_seconds=_NODE_SECONDS) is not None
    finally:
        release(asking)


def scales_itself() -> bool:
    """Whether the cluster was started with Ray's autoscaler (its second version), as KubeRay and
    `ray up` start it.
    """
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return is_autoscaler_v2(fetch_from_server=True)
