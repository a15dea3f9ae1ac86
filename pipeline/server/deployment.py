"""The server on Ray Serve: replicas of the app, each with its own engine."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import Metric
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ServerError, SpecError
from pipeline.server.front import DRAIN_SECONDS, drain
from pipeline.server.guard import Refused
from pipeline.server.image_urls import check_place
from pipeline.server.settings import Settings
from pipeline.serving.capacity import CAPACITY_BYTES
from pipeline.utils.devices import reserved_gpu
from pipeline.utils.precision import Precision

if TYPE_CHECKING:
    from pipeline.server.engine import Engine

TOKEN_VARIABLE = "TASKPACK_TOKEN"
APPLICATION = "taskpack"
_ONGOING = 256
_COUNT_SECONDS = 5
_QUEUED = 128
"""Requests that a proxy keeps while each replica has `_ONGOING`."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def application(settings: Settings, *, replicas: int, cpus: float, gpus: float) -> Any:
    """The Ray Serve application of a server."""
    from ray import serve

    @serve.ingress()
    class Packs:
        def __init__(self) -> None:
            self._engine = open_engine(settings)

        def __serve_build_asgi_app__(self) -> Any:
            from pipeline.server.app import build_app

            return build_app(self._engine, _counted_by_all)

        def counted(self) -> tuple[str, list[Metric]]:
            return serve.get_replica_context().replica_tag, self._engine.counted()

    deployment = serve.deployment(
        Packs,
        name="packs",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=_ONGOING,
        max_queued_requests=_QUEUED,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        health_check_period_s=5,
        max_constructor_retry_count=1,
    )
    return deployment.bind()


def open_engine(settings: Settings) -> Engine:
    """The engine of a replica, on the GPU that the replica was given, if any."""
    from pipeline.server.engine import Engine

    return Engine(replace(settings, device=replica_device(settings.device)))


def replica_device(asked: str | None) -> str | None:
    """The device of this replica: what the user asked for, else the GPU that Ray gave it, else
    None. Raises ClusterError if torch cannot use that GPU.
    """
    import ray

    if asked is not None or not ray.get_runtime_context().get_assigned_resources().get("GPU"):
        return asked
    return reserved_gpu("serve on CPUs without --gpus (num_gpus in a config file)")


async def _counted_by_all() -> dict[str, list[Metric]]:
    """What each replica has counted, by its name, asked from within one; those that die meanwhile
    are left out. Raises Refused where one does not answer in time.
    """
    from ray import serve

    here = serve.get_replica_context()
    replicas = serve.get_deployment_handle(here.deployment, here.app_name).broadcast("counted")
    try:
        answers = await replicas.results_async(timeout_s=_COUNT_SECONDS, return_exceptions=True)
    except TimeoutError:
        raise Refused(503, "a replica does not answer; ask again", {"Retry-After": "1"}) from None
    return dict(each for each in answers if isinstance(each, tuple))


def configured(args: dict[str, Any]) -> Any:
    """The application from the `args` of a Serve config file, which `deploy/` has for a cluster.

    Args:
        args: `workdir`, and optionally `tasks` to load at the start, `backbone` (its checkpoint),
            `device`, `precision`, `memory_bytes` for packs per replica, and `images_from`, the
            places that requests may name images in. The config's `deployments` say how many
            replicas there are, and what each needs.

    Raises:
        SpecError: an argument is missing, unknown or of the wrong type, or there is no token.
    """
    try:
        given = _Arguments.model_validate(args)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise SpecError(f"args: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise SpecError(
            f"a server on a cluster is open to its network; set {TOKEN_VARIABLE} for its replicas"
        )
    settings = Settings(
        given.workdir,
        given.tasks,
        registry=os.environ.get("MLFLOW_TRACKING_URI"),
        weights=given.backbone,
        device=given.device,
        precision=given.precision,
        token=token,
        images_from=tuple(check_place(place) for place in given.images_from),
        capacity_bytes=given.memory_bytes,
    )
    return application(settings, replicas=1, cpus=1, gpus=0)


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")

    workdir: Path
    tasks: tuple[str, ...] = ()
    backbone: str | None = None
    device: str | None = None
    precision: Precision = "fp32"
    memory_bytes: int = Field(CAPACITY_BYTES, gt=0)
    images_from: tuple[str, ...] = ()


@contextmanager
def running(
    settings: Settings, *, host: str, port: int, replicas: int, cpus: float, gpus: float, key: str
) -> Iterator[None]:
    """A context in which the server answers at `host` and `port`; Ray must be running, and its
    processes have `key` as their `DRAIN_KEY`. At its end, new requests are refused, and those that
    have come are answered, for up to a minute.

    Raises:
        SpecError: the server would be open to a network without a token.
        ServerError: a replica cannot start.
    """
    if settings.token is None and host not in _LOOPBACK:
        raise SpecError(
            f"--host: given {host!r}, which other machines reach, without a token; set"
            f" {TOKEN_VARIABLE} to one, or leave --host out"
        )
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options={"host": host, "port": port})
    try:
        try:
            serve.run(
                application(settings, replicas=replicas, cpus=cpus, gpus=gpus),
                name=APPLICATION,
                route_prefix="/",
            )
        except RuntimeError as error:
            raise ServerError(f"the server does not start: {_cause(error)}") from None
        try:
            yield
        finally:
            _drain_proxies(host, port, key)
    finally:
        with suppress(TimeoutError):
            serve.delete(APPLICATION)  # its replicas end their requests while the proxy is there
        serve.shutdown()


def _drain_proxies(host: str, port: int, key: str) -> None:
    """Drain the proxies: of every node, unless `host` is one machine's address."""
    import ray

    hosts = [host]
    if host in ("0.0.0.0", "::"):
        hosts = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(len(hosts)) as pool:
        list(pool.map(lambda each: drain(each, port, key), hosts))


def _cause(error: RuntimeError) -> str:
    """What the replica that did not start said last, or else the error."""
    from ray import serve

    found = serve.status().applications[APPLICATION].deployments.values()
    [*_, said] = (str(error), *(each.message for each in found if each.message))
    return re.sub(r"^pipeline\.errors\.\w+: ", "", said.strip().splitlines()[-1])
