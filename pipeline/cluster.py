"""Ray, started here or joined: the only place that connects."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator

from pipeline.errors import ClusterError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
}


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
    if address.startswith("ray://"):
        raise ClusterError(f"--address: given {address!r}; the Ray Client is not supported. Run this command on the cluster with --address auto")
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        detail = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ClusterError(
            f"--address: no Ray cluster answers at {address!r} ({detail}); start one with `ray start --head`, or leave --address out"
        ) from None


def cluster_resources() -> tuple[int, int]:
    """CPUs and GPUs of the cluster, whole numbers."""
    import ray

    resources = ray.cluster_resources()
    return max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))
