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
from pathlib import Path
from typing import TypeVar

from pipeline.errors import ClusterError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_DEDUP_LOGS": "1",
}
_ANSWER_SECONDS = 10

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


def session_logs() -> Path:
    """The folder of this node's logs of Ray, whose files the cluster's dashboard hands out. Ray must run."""
    import ray

    return Path(ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).address_info["session_dir"], "logs")


def cluster_resources() -> tuple[int, int]:
    """CPUs and GPUs of the cluster, whole numbers."""
    import ray

    resources = ray.cluster_resources()
    return max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))


def check_fits_a_node(cpus: float, gpus: float) -> None:
    """Raise ClusterError where no node has what one trial asks for: Ray would wait for ever."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        had = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ClusterError(f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, which no node has ({had}); lower --cpus-per-trial or --gpus-per-trial")
