"""Whether torch can use the GPUs of a cluster, asked of its workers before a run prepares anything:
every trial would find out for itself, and fail.
"""

from __future__ import annotations

import contextlib

from pipeline.cluster.capacity import gpu_kinds, of_kind
from pipeline.errors import TaskpackError, named
from pipeline.utils.devices import reserved_gpu

_SECONDS = 60
"""Longest wait for answers: workers take seconds to start, and where trials of others hold all
GPUs, nobody waits for them to end.
"""
_GPU_SHARE = 0.01


def check_gpus_of_workers() -> None:
    """Raise ClusterError if torch cannot use a GPU of the cluster. One worker looks on one node of
    each kind of GPU that has one free. Ray must be running.
    """
    import ray
    from ray.exceptions import RayError

    usable = ray.remote(num_cpus=0, num_gpus=_GPU_SHARE, max_retries=1)(_fault)
    asked = [usable.options(resources=of_kind(kind)).remote() for kind in gpu_kinds()]
    try:
        for each in ray.wait(asked, num_returns=len(asked), timeout=_SECONDS)[0] if asked else ():
            with contextlib.suppress(RayError):  # its worker died, which says nothing of GPUs
                if (fault := ray.get(each)) is not None:
                    raise fault
    finally:
        for each in asked:
            ray.cancel(each, force=True)


def _fault() -> TaskpackError | None:
    """What keeps torch from this worker's GPU. As an exception, Ray would change its text."""
    try:
        reserved_gpu()
    except Exception as error:
        return named(error)
    return None
