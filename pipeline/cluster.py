"""Ray, started here or joined: the only place that connects."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from pipeline.errors import ClusterError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_DEDUP_LOGS": "1",
}
_ANSWER_SECONDS = 10
_NODE_SECONDS = 1200  # a GPU machine that pulls a large image takes its time

Result = TypeVar("Result")


@contextlib.contextmanager
def ray_session(address: str | None = None) -> Iterator[None]:
    """A running Ray: a private one on this machine (`address` None), or the cluster at `address` (`auto`: the one this machine belongs to).

    A Ray that is already initialised in this process is used as it is and left running.

    Raises:
        ClusterError: no cluster answers at `address`.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    if address is None and "ray" not in sys.modules:
        # A private cluster listens on every interface; a token of its own keeps strangers out. Ray reads it at import.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        yield
        return
    _connect(address)
    try:
        yield
    finally:
        ray.shutdown()


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


def interruptible(action: Callable[[], Result]) -> Result:
    """Run `action` in a thread, so that Ctrl-C stays with this one.

    Called from the main thread, Ray Train puts a handler of its own for Ctrl-C, which ends the process without a word, and never takes it back.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:  # whatever it is, it is the caller's
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result()


def cluster_resources() -> tuple[int, int]:
    """CPUs and GPUs of the cluster, whole numbers."""
    import ray

    resources = ray.cluster_resources()
    return max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))


def wait_for_node(cpus: float, gpus: float) -> None:
    """Return when a node has `cpus` and `gpus`: at once where one is there, else, on a cluster that scales itself, when it has started one.

    What asks for a node is a task, so nothing is left to ask for it once this process has ended.

    Raises:
        ClusterError: no node has that, and none comes: Ray would wait for ever.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        return
    waited = ""
    if _scales_itself():
        asking = ray.remote(num_cpus=cpus, num_gpus=gpus)(_nothing).remote()
        if ray.wait([asking], timeout=_NODE_SECONDS)[0]:
            return
        ray.cancel(asking)
        waited = f", and the autoscaler brought none in {_NODE_SECONDS // 60} minutes"
    had = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    raise ClusterError(
        f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, which no node has ({had}){waited}; lower --cpus-per-trial or --gpus-per-trial"
    )


def _scales_itself() -> bool:
    """Whether the cluster was started with Ray's autoscaler (its second version), as KubeRay and `ray up` start it."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return is_autoscaler_v2(fetch_from_server=True)


def _nothing() -> None:
    pass
