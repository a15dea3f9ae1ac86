"""Starting or joining Ray: the only module that connects to it."""

from __future__ import annotations

import _thread
import contextlib
import gc
import importlib
import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from pipeline.cluster.task_pool import Interrupted
from pipeline.errors import ClusterError
from pipeline.utils.signals import handlers_kept

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
_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107
_HEAD_LOOK_SECONDS = 2
_HEAD_SECONDS = 50
"""Seconds that a cluster's head may be silent. After 60 seconds Ray would end this process."""

Result = TypeVar("Result")


@contextlib.contextmanager
def ray_session(
    address: str | None = None, variables: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A context with a running Ray: a private one on this machine (`address` None), or the cluster
    at `address` (`auto`: that of this machine). Its processes for this one get environment
    variables.

    A Ray that is already initialised in this process is used as it is and left running.

    Raises:
        ClusterError: No cluster answers at `address`, or its head has died. The latter interrupts
            the main thread, which must be this one.
    """
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    if address is None and "ray" not in sys.modules:
        # A private cluster listens on every interface; a token of its own keeps strangers out. Ray
        # reads it at import.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    _import_libraries()
    with _libraries_set_aside():
        if ray.is_initialized():
            yield
        else:
            with _connected(address, variables or {}):
                yield


@contextlib.contextmanager
def _connected(address: str | None, variables: Mapping[str, str]) -> Iterator[None]:
    import ray

    _keep_output_clean()
    _keep_signals()
    try:
        with handlers_kept():
            _connect(address, variables)
        with contextlib.nullcontext() if address is None else _watched_head():
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _libraries_set_aside() -> Iterator[None]:
    """Exclude everything that is loaded now from garbage collection: the libraries have half a
    million objects, and searching them after every study takes 0.3 s. At the end they are included
    again, so that whatever becomes unreachable meanwhile is freed then.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _watched_head() -> Iterator[None]:
    """Interrupt the body if the head of the cluster dies, and raise ClusterError."""
    import ray

    address = ray.get_runtime_context().gcs_address
    ended, lost = threading.Event(), threading.Event()

    def watch() -> None:
        answered = time.monotonic()
        while not ended.wait(_HEAD_LOOK_SECONDS):
            if _refusal(address) is None:
                answered = time.monotonic()
            elif time.monotonic() - answered > _HEAD_SECONDS and not ended.is_set():
                lost.set()
                return _thread.interrupt_main()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        raise ClusterError(
            f"the head of the Ray cluster at {address} has not answered for {_HEAD_SECONDS}"
            " seconds; when the cluster is up again, run the same command: finished work is kept"
        ) from None
    finally:
        ended.set()


def _keep_output_clean() -> None:
    """Keep Ray's node-failure messages and their logs off standard output, where they would mix
    with results.

    Tune logs a page for each worker that dies, which is retried, and for each failed trial, which
    the study reports.
    """
    import ray

    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: logging.getLogger(
        "ray"
    ).info("%s", data["lines"])
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


def _keep_signals() -> None:
    """Keep our handler of SIGTERM: Ray's would end this process immediately, even while Ray is
    starting.
    """
    import ray

    ray._private.utils.set_sigterm_handler = lambda handler: None


def _import_libraries() -> None:
    """Import Ray's Train and Tune in one thread: they import each other, so two threads would see
    incomplete modules.
    """
    for name in ("ray.train.torch", "ray.tune"):
        importlib.import_module(name)


def _connect(address: str | None, variables: Mapping[str, str]) -> None:
    import ray

    options: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if variables:
        options["runtime_env"] = {"env_vars": dict(variables)}
    if address is None:
        ray.init(address="local", include_dashboard=False, _temp_dir=_session_folder(), **options)
        return
    _check_answers(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        detail = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise _no_cluster(address, detail) from None


def _session_folder() -> str:
    """The folder for the sessions of a private Ray. Raises ClusterError if the path of a socket in
    it would be too long.
    """
    folder = os.path.join(tempfile.gettempdir(), "ray")
    socket_path = os.path.join(
        folder, f"session_2026-01-01_00-00-00_000000_{os.getpid()}", "sockets", "plasma_store"
    )
    surplus = len(os.fsencode(socket_path)) - _SOCKET_PATH_BYTES
    if surplus > 0:
        raise ClusterError(
            f"the temporary folder {tempfile.gettempdir()} is {surplus} bytes too long for the"
            " sockets of Ray; set a shorter TMPDIR"
        )
    return folder


def _check_answers(address: str) -> None:
    """Raise ClusterError if nothing listens: Ray itself would try for minutes, with a warning every
    few seconds.
    """
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise ClusterError(
            f"--address: given {address!r}; the Ray Client is not supported. Run this command on"
            " the cluster with --address auto"
        )
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ClusterError(
            f"--address: given {address!r}; expected auto, or HOST:PORT of the cluster's head such"
            " as 10.0.0.1:6379"
        )
    if (refusal := _refusal(address)) is not None:
        raise _no_cluster(address, refusal)


def _refusal(address: str) -> str | None:
    """Why nothing listens at HOST:PORT; None if something does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return None


def _no_cluster(address: str, detail: str) -> ClusterError:
    return ClusterError(
        f"--address: no Ray cluster answers at {address!r} ({detail}); start one with `ray start"
        " --head`, or leave --address out"
    )


def interruptible(action: Callable[[], Result], is_stopping: Callable[[], bool]) -> Result:
    """Run `action` in a daemon thread; raise Interrupted once `is_stopping()` is true and abandon
    the thread, because Ray Train's wait cannot be cancelled."""
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:  # any exception is passed to the caller
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not is_stopping():
        with contextlib.suppress(TimeoutError):
            return outcome.result(timeout=_LOOK_SECONDS)
    raise Interrupted


def session_logs() -> Path:
    """The log folder of Ray on this node, whose files the cluster's dashboard serves. Ray must be
    running.
    """
    import ray

    return Path(
        ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).address_info["session_dir"],
        "logs",
    )


def is_connected() -> bool:
    """Whether Ray is initialised in this process."""
    is_initialized = getattr(
        sys.modules.get("ray"), "is_initialized", None
    )  # another thread may be importing it
    return is_initialized is not None and bool(is_initialized())
