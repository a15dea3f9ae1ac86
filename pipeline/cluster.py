"""Ray, started here or joined: the only place that connects."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import ClusterError
from pipeline.together import Interrupted

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_DEDUP_LOGS": "1",
    # A worker group may have to wait for other tasks' trials to end, or for a node to start.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3600",
    # Tune would warn of every trial that waits for another task's.
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
}
_ANSWER_SECONDS = 10
_LOOK_SECONDS = 0.5

Result = TypeVar("Result")


@contextlib.contextmanager
def ray_session(address: str | None = None) -> Iterator[None]:
    """A running Ray: a private one on this machine (`address` None), or the cluster at `address` (`auto`: the one this machine belongs to).

    A Ray that is already initialised in this process is used as it is and left running.

    Raises:
        ClusterError: no cluster answers at `address`.
    """
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    if address is None and "ray" not in sys.modules:
        # A private cluster listens on every interface; a token of its own keeps strangers out. Ray reads it at import.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    _import_libraries()
    if ray.is_initialized():
        yield
        return
    _connect(address)
    try:
        yield
    finally:
        ray.shutdown()


def _import_libraries() -> None:
    """Ray's Train and Tune import each other: two threads that begin with one each would meet half-made modules."""
    for name in ("ray.train.torch", "ray.tune"):
        importlib.import_module(name)


def _connect(address: str | None) -> None:
    import ray

    options: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # A short folder: Ray's sockets live there, and their paths are limited to 107 bytes.
        ray.init(address="local", include_dashboard=False, _temp_dir=os.path.join(tempfile.gettempdir(), "ray"), **options)
        return
    _check_answers(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        detail = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise _no_cluster(address, detail) from None


def _check_answers(address: str) -> None:
    """Raise ClusterError where nothing listens: Ray itself would try for minutes, with a warning every few seconds."""
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise ClusterError(f"--address: given {address!r}; the Ray Client is not supported. Run this command on the cluster with --address auto")
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ClusterError(f"--address: given {address!r}; expected auto, or HOST:PORT of the cluster's head such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, detail: str) -> ClusterError:
    return ClusterError(f"--address: no Ray cluster answers at {address!r} ({detail}); start one with `ray start --head`, or leave --address out")


def interruptible(action: Callable[[], Result], is_stopping: Callable[[], bool]) -> Result:
    """Run `action` in a thread, and leave it there with Interrupted where `is_stopping` comes to hold: Ray Train's own wait cannot be ended."""
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:  # whatever it is, it is the caller's
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not is_stopping():
        with contextlib.suppress(TimeoutError):
            return outcome.result(timeout=_LOOK_SECONDS)
    raise Interrupted


def first_ended(running: Sequence[Any], is_stopping: Callable[[], bool]) -> Any:
    """The first of these Ray tasks to end. Raises Interrupted where `is_stopping` comes to hold before."""
    import ray

    while not is_stopping():
        ended, _ = ray.wait(list(running), timeout=_LOOK_SECONDS)
        if ended:
            return ended[0]
    raise Interrupted


@dataclass(frozen=True)
class Nodes:
    """`count` nodes with `cpus` CPUs and `gpus` GPUs each."""

    cpus: float
    gpus: float
    count: int = 1

    def places(self, cpus: float, gpus: float) -> int:
        """How many workers of so many CPUs and GPUs one of them holds."""
        rooms = [int(has / asked + 1e-6) for has, asked in ((self.cpus, cpus), (self.gpus, gpus)) if asked]
        return min(rooms, default=0)


def is_connected() -> bool:
    """Whether this process has a Ray."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def running_nodes() -> list[Nodes]:
    """The nodes that the cluster has now."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Nodes(each.get("CPU", 0), each.get("GPU", 0)) for each in resources]


def startable_nodes() -> list[Nodes]:
    """The kinds of nodes that the cluster's autoscaler may start, as it has told the cluster; none where nothing scales it."""
    import ray

    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config is not None else []
    return [Nodes(group.resources.get("CPU", 0), group.resources.get("GPU", 0), group.max_count) for group in groups if group.max_count != 0]


def has_gpus() -> bool:
    """Whether the cluster has GPUs, or may start nodes that do."""
    return any(nodes.gpus for nodes in [*running_nodes(), *startable_nodes()])


def places(cpus: float, gpus: float) -> int:
    """How many workers of so many CPUs and GPUs the cluster's nodes hold now."""
    return sum(nodes.places(cpus, gpus) for nodes in running_nodes())


def check_fits_a_node(cpus: float, gpus: float) -> None:
    """Raise ClusterError where no node has what one trial asks for, nor any that could be started: Ray would wait for ever."""
    running, startable = running_nodes(), startable_nodes()
    if not any(nodes.places(cpus, gpus) for nodes in [*running, *startable]):
        had = ", ".join(f"{nodes.cpus:g} CPUs and {nodes.gpus:g} GPUs" for nodes in [*running, *startable])
        raise ClusterError(f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, which no node has ({had}); lower --cpus-per-trial or --gpus-per-trial")


def check_holds_group(workers: int, cpus: float, gpus: float) -> None:
    """Raise ClusterError where the cluster cannot hold `workers` at once, unless it can grow: Ray would wait for an hour."""
    held = places(cpus, gpus)
    if workers > held and not startable_nodes():
        raise ClusterError(f"--selection-workers: given {workers}, the cluster has room for {held}, each with a CPU{' and a GPU' if gpus else ''}")
