"""The HTTP interface: an ASGI app over an engine."""

from __future__ import annotations

import asyncio
import base64
import itertools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import Metric
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from pipeline.errors import (
    PackError,
    RegistryError,
    RegistryRefused,
    RegistryUnreachable,
    SpecError,
    TaskpackError,
)
from pipeline.registry.pack_record import KIND_TAG, RegisteredPack
from pipeline.server.batcher import Busy, Closed
from pipeline.server.bodies import read_requests
from pipeline.server.decoder import Decoder
from pipeline.server.engine import Engine, TooManyPixels
from pipeline.server.guard import Guard, Refused, refusal
from pipeline.server.image_urls import ImageUrls
from pipeline.server.metrics import as_text
from pipeline.server.openapi import ANSWER, MANY_BODY, ONE_BODY
from pipeline.server.page import add_pages

_NAME = re.compile(r"[^/@:'\"`%\\\x00-\x1f]{1,200}(?:@[\w.-]{1,100})?")
_STATUSES: tuple[tuple[type[TaskpackError], int], ...] = (
    (Busy, 429),
    (TooManyPixels, 413),
    (Closed, 503),
    (RegistryUnreachable, 503),
    (RegistryRefused, 502),
    (RegistryError, 404),
    (PackError, 409),
    (SpecError, 400),
)
_MOST_LISTED = 200


Counted = Callable[[], Awaitable[dict[str, list[Metric]]]]
"""What every replica of the server has counted, by the replicas' names."""


def build_app(engine: Engine, counted: Counted | None = None) -> Guard:
    """The app on an engine, which is closed, after predicting what waits, when the server ends.
    Without `counted` it is the only replica.
    """

    async def alone() -> dict[str, list[Metric]]:
        return {"0": engine.counted()}

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="taskpack", docs_url=None, redoc_url=None, lifespan=life)
    app.add_exception_handler(Refused, lambda _, error: refusal(error))  # type: ignore[arg-type]
    app.add_exception_handler(TaskpackError, lambda _, error: refusal(_named(error)))  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    _add_predictions(app, engine)
    _add_tasks(app, engine)
    _add_operations(app, counted or alone)
    add_pages(app)
    return Guard(app, engine.settings.limits, engine.settings.token, engine.metrics)


def _add_predictions(app: FastAPI, engine: Engine) -> None:
    limits = engine.settings.limits
    decoder = Decoder(engine.images, limits, ImageUrls(engine.settings.images_from, limits))

    async def answer(request: Request, task: str | None) -> Response:
        began = time.monotonic()
        asked = await read_requests(request, task, limits)
        for name in {name for name, _ in asked}:
            _check_name(name)
        names = [name for name, _ in asked]
        with engine.counting(names):
            images = await asyncio.to_thread(decoder.decode, asked)
            futures = await asyncio.to_thread(engine.submit, list(zip(names, images, strict=True)))
            rows = await asyncio.gather(*map(asyncio.wrap_future, futures))
        predictions = [
            {"task": name, **_as_json(row)} for name, row in zip(names, rows, strict=True)
        ]
        return JSONResponse({"predictions": predictions, "seconds": time.monotonic() - began})

    @app.post("/v1/tasks/{name}:predict", openapi_extra=ONE_BODY, responses=ANSWER)
    async def predict_task(name: str, request: Request) -> Response:
        """Predict images of one task."""
        return await answer(request, name)

    @app.post("/v1/predict", openapi_extra=MANY_BODY, responses=ANSWER)
    async def predict(request: Request) -> Response:
        """Predict images of several tasks."""
        return await answer(request, None)


def _add_tasks(app: FastAPI, engine: Engine) -> None:
    @app.get("/v1/tasks")
    def tasks(limit: int = 50, after: str | None = None) -> dict[str, Any]:
        """List the champions on this server's backbone, best first, `limit` on a page; `next` is
        what the next page comes `after`, null on the last one.
        """
        if not 1 <= limit <= _MOST_LISTED:
            raise Refused(400, f"limit: given {limit}; expected 1 to {_MOST_LISTED}")
        champions = engine.catalogue.registry.champions(engine.host.backbone.fingerprint, after)
        [*found] = itertools.islice(champions, limit + 1)
        return {
            "tasks": [_summary(pack) for pack in found[:limit]],
            "next": found[limit - 1].reference if len(found) > limit else None,
        }

    @app.get("/v1/tasks/{name}")
    def task(name: str) -> dict[str, Any]:
        """Show the pack that is served for a task: its numbers, its bytes by part and, once it is
        loaded, its classes in order and the coverage of its sets."""
        _check_name(name)
        pack = engine.served(name)
        parts = {
            key.removeprefix("bytes_"): int(value)
            for key, value in pack.metrics.items()
            if key.startswith("bytes_")
        }
        metrics = {key: value for key, value in pack.metrics.items() if "bytes" not in key}
        resident = engine.host.packs.resident(name)
        return {
            **_summary(pack),
            "classes": None if resident is None else resident.metadata.classes,
            "coverage": None if resident is None else resident.guarantee.get("coverage"),
            "metrics": metrics,
            "bytes": parts,
            "recipe": pack.params,
        }


def _add_operations(app: FastAPI, counted: Counted) -> None:
    @app.get("/healthz")
    @app.get("/readyz")
    def health() -> dict[str, str]:
        """Say that the server runs, and its backbone and first packs are loaded."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics of all replicas."""
        return Response(as_text(await counted()), media_type="text/plain; version=0.0.4")


def _summary(pack: RegisteredPack) -> dict[str, Any]:
    return {
        "name": pack.name,
        "version": pack.version,
        "aliases": pack.aliases,
        "kind": pack.tags.get(KIND_TAG),
        "metric": pack.metric,
        "test_metric": pack.metrics.get("test_metric"),
        "size_bytes": pack.size_bytes,
        "digest": pack.pack_digest,
        "backbone": pack.tags.get("backbone"),
    }


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    """A prediction whose bytes are base64."""
    return {
        key: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for key, value in row.items()
    }


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise Refused(400, f"{name[:80]!r}: no name of a task; expected NAME or NAME@ALIAS")


def _named(error: TaskpackError) -> Refused:
    status = next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)
    return Refused(status, str(error), {"Retry-After": "1"} if status in (429, 503) else {})


def _http_error(_: Request, error: HTTPException) -> Response:
    return refusal(Refused(error.status_code, f"{error.detail}; see /openapi.json"))


def _invalid(_: Request, error: RequestValidationError) -> Response:
    fault = error.errors()[0]
    return refusal(Refused(400, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"))
