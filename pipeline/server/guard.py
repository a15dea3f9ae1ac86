"""What every request passes before it is read: size and time limits, and the token.

An ASGI middleware. It answers in JSON and never lets more bytes in than `Limits` says.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.server.metrics import Metrics
from pipeline.server.page import PATHS
from pipeline.server.settings import Limits

OPEN_PATHS = ("/healthz", "/readyz", *PATHS)
"""Answered without a token: they say nothing but that the server runs, and what its pages are."""
_log = logging.getLogger(__name__)


class Refused(Exception):
    """A request that is answered with an HTTP status and one sentence."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


def refusal(error: Refused) -> JSONResponse:
    """The answer to a refused request."""
    return JSONResponse({"error": str(error)}, error.status, error.headers)


class Bodies:
    """The bytes of the bodies of all requests under way."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._under_way_bytes = limits, 0

    def add(self, size: int) -> int:
        """Count bytes that came; negative ones for a request that ended."""
        self._under_way_bytes += size
        return size

    def check(self, size: int) -> None:
        """Raises Refused where a body of so many bytes is too large, or all together are."""
        if size > self._limits.request_bytes:
            raise Refused(
                413, f"the body has more than {self._limits.request_bytes} bytes; send less at once"
            )
        if self._under_way_bytes > self._limits.waiting_bytes:
            raise Refused(
                429, "too many requests are under way; try again later", {"Retry-After": "1"}
            )


class Guard:
    """Wraps an ASGI app."""

    def __init__(self, app: ASGIApp, limits: Limits, token: str | None, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._token = None if token is None else f"Bearer {token}".encode()
        self._bodies = Bodies(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        began, status, received = time.monotonic(), 500, 0

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def limited_receive() -> Message:
            nonlocal received
            left = began + self._limits.body_seconds - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.01))
            except TimeoutError:
                raise Refused(
                    408, f"the body did not arrive within {self._limits.body_seconds:g} s"
                ) from None
            received += self._bodies.add(len(message.get("body", b"")))
            self._bodies.check(received)
            return message

        try:
            self._check_head(scope)
            await self._app(scope, limited_receive, watched_send)
        except Refused as error:
            await refusal(error)(scope, receive, watched_send)
        except Exception:
            _log.exception("%s %s", scope["method"], scope["path"])
            failure = Refused(500, "the server failed; its log says why")
            await refusal(failure)(scope, receive, watched_send)
        finally:
            self._bodies.add(-received)
            self._metrics.observe_request(status, time.monotonic() - began)

    def _check_head(self, scope: Scope) -> None:
        """Raises Refused for a head that is too long, a wrong token, or a body that will be too
        large.
        """
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > self._limits.header_bytes:
            raise Refused(431, f"the headers take more than {self._limits.header_bytes} bytes")
        given = dict(headers)
        if self._token is not None and scope["path"] not in OPEN_PATHS:
            token = given.get(b"authorization", b"")
            if not hmac.compare_digest(token, self._token):
                raise Refused(
                    401,
                    "no valid token; send the header Authorization: Bearer TOKEN",
                    {"WWW-Authenticate": "Bearer"},
                )
        length = given.get(b"content-length", b"0")
        if not length.isdigit():
            raise Refused(400, "the header Content-Length is not a number")
        self._bodies.check(int(length))
