"""What stands before the app in the proxies of Ray Serve: bounds on what a request has the proxy
keep, and Ray's own answers in the form of the app's.

Ray Serve calls `open_front` in each proxy before it listens, as `SETTING` says.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.server.guard import Bodies, Refused, refusal
from pipeline.server.settings import Limits

SETTING = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipeline.server.front:open_front"}
"""An environment variable that the processes of Ray need."""
_AGAIN = {"Retry-After": "1"}


def open_front() -> list[Middleware]:
    """Make uvicorn read requests with h11 in this process, which ends a connection whose request
    has a head of more than 64 KiB; httptools, which it prefers, reads heads of any length.
    """
    from uvicorn.config import HTTP_PROTOCOLS

    HTTP_PROTOCOLS["auto"] = HTTP_PROTOCOLS["h11"]
    return [Middleware(Front, limits=Limits())]


class Front:
    """Wraps the proxy, an ASGI app that reads bodies before a replica asks for them.

    A body of more bytes than `limits` allows is not read on. What the proxy refuses itself, in
    plain text, is answered in JSON: with 503 where no replica is there yet or any more, and 429
    where too many requests wait for one.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._bodies = app, Bodies(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
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
        return Refused(503, "the server starts or ends; send the request again", _AGAIN)
    if b"backpressure" in body:
        return Refused(429, "too many requests are waiting; try again later", _AGAIN)
    return Refused(status, body.decode(errors="replace"), _AGAIN if status == 503 else None)
