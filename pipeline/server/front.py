"""What stands before the app in the proxies of Ray Serve: bounds on what a request has the proxy
keep, Ray's own answers in the form of the app's, and a shutdown before which every request that has
come is answered.

Ray Serve calls `open_front` in each proxy before it listens, as `SETTING` says. It ends a proxy
that takes long to start, so nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import hmac
import http.client
import os
import time
from contextlib import suppress

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.server.guard import Bodies, Refused, refusal
from pipeline.server.settings import Limits

SETTING = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipeline.server.front:open_front"}
"""An environment variable that the processes of Ray need."""
DRAIN_KEY = "TASKPACK_DRAIN_KEY"
"""An environment variable of these processes: what `drain` has to know."""
DRAIN_SECONDS = 30
_DRAIN_PATH, _KEY_HEADER = "/-/drain", "drain-key"
_LOOK_SECONDS = 0.05
_AGAIN = {"Retry-After": "1"}
_ENDING = Refused(
    503, "the server starts or ends; send the request again", _AGAIN | {"Connection": "close"}
)


def open_front() -> list[Middleware]:
    """Make uvicorn read requests with h11 in this process, which ends a connection whose request
    has a head of more than 64 KiB; httptools, which it prefers, reads heads of any length.
    """
    from uvicorn.config import HTTP_PROTOCOLS

    HTTP_PROTOCOLS["auto"] = HTTP_PROTOCOLS["h11"]
    return [Middleware(Front, limits=Limits(), drain_key=os.environ.get(DRAIN_KEY) or None)]


def drain(host: str, port: int, key: str) -> None:
    """Have the proxy that listens there refuse new requests, and return when all that it has are
    answered, or after `DRAIN_SECONDS`. One that does not know the key goes on as before.
    """
    connection = http.client.HTTPConnection(host, port, timeout=DRAIN_SECONDS + 5)
    with suppress(OSError, http.client.HTTPException):
        connection.request("POST", _DRAIN_PATH, headers={_KEY_HEADER: key})
        connection.getresponse().read()
    connection.close()


class Front:
    """Wraps the proxy, an ASGI app that reads bodies before a replica asks for them.

    A body of more bytes than `limits` allows is not read on. What the proxy refuses itself, in
    plain text, is answered in JSON: with 503 where no replica is there yet or any more, and 429
    where too many requests wait for one. Once drained with its key, it refuses all requests.
    """

    def __init__(self, app: ASGIApp, limits: Limits, drain_key: str | None = None) -> None:
        self._app, self._bodies, self._drain_key = app, Bodies(limits), drain_key
        self._under_way, self._is_ending = 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._is_drain(scope):
            await self._drain()
            return await Response(status_code=204)(scope, receive, send)
        if self._is_ending:
            return await refusal(_ENDING)(scope, receive, send)
        self._under_way += 1
        try:
            await self._pass_on(scope, receive, send)
        finally:
            self._under_way -= 1

    def _is_drain(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(_KEY_HEADER.encode(), b"")
        key = self._drain_key
        is_known = key is not None and hmac.compare_digest(given, key.encode())
        return is_known and scope["path"] == _DRAIN_PATH

    async def _drain(self) -> None:
        """Refuse requests from now on; return when those under way are answered, or in time."""
        self._is_ending = True
        until = time.monotonic() + DRAIN_SECONDS
        while self._under_way and time.monotonic() < until:
            await asyncio.sleep(_LOOK_SECONDS)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        received, has_begun = 0, False
        theirs: Message | None = None
        refused: Refused | None = None

        async def bounded() -> Message:
            nonlocal received, refused
            message = await receive()
            received += self._bodies.add(len(message.get("body", b"")))
            try:
                self._bodies.check(received)
            except Refused as error:
                refused = error
                return {"type": "http.disconnect"}  # so that the proxy gives the request up
            return message

        async def said(message: Message) -> None:
            nonlocal has_begun, theirs, refused
            if message["type"] == "http.response.start" and _is_of_ray(message):
                theirs = message
            elif theirs is not None:
                refused = _refused(theirs["status"], message["body"])
            else:
                has_begun = True
                await send(message)

        try:
            await self._app(scope, bounded, said)
        finally:
            self._bodies.add(-received)
        if not has_begun:
            died = Refused(500, "the replica that had this request died; ask again")
            await refusal(refused or died)(scope, receive, send)


def _is_of_ray(start: Message) -> bool:
    """Whether an answer that begins so is a refusal of Ray's: the app's are JSON."""
    kind = dict(map(tuple, start["headers"])).get(b"content-type", b"")
    return start["status"] >= 400 and kind.startswith(b"text/plain")


def _refused(status: int, body: bytes) -> Refused:
    """What one of Ray's answers says."""
    if status == 404:  # for all addresses: the application is not there
        return _ENDING
    if b"backpressure" in body:
        return Refused(429, "too many requests are waiting; try again later", _AGAIN)
    return Refused(status, body.decode(errors="replace"), _AGAIN if status == 503 else None)
