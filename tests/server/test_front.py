"""What stands before the app in `taskpack serve`: the proxy of Ray Serve, within bounds."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers_server import (
    TOKEN,
    Shop,
    ask,
    half_sent,
    listening,
    png,
    processes_of,
    serving,
    wait_until,
)
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from pipeline.server.client import Client
from pipeline.server.front import Front, drain
from pipeline.server.settings import Limits

pytest.importorskip("grpc_reflection", reason="the extra serving (ray[serve]) is not installed")
MEBIBYTE = 1024**2


@pytest.fixture(scope="module")
def proxied(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """The address of a server, and the process id of its proxy."""
    mark = uuid.uuid4().hex
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(shop, log, mark, "--cpus", "0.5") as url:
        [proxy] = processes_of(mark, "ProxyActor")
        yield url, proxy


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def answer_to_endless(url: str, head: bytes, piece: bytes, pieces: int) -> bytes:
    """What is answered to a head and many pieces after it; empty where the connection breaks."""
    with connected(url) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head)
            for _ in range(pieces):
                connection.sendall(piece)
        with contextlib.suppress(ConnectionError):
            return connection.recv(4096)
    return b""


def memory(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096


def status_in_a_second(port: int) -> int | None:
    """The status that a request is answered with; None if it has to wait."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    with contextlib.closing(connection), contextlib.suppress(TimeoutError):
        connection.request("GET", "/readyz")
        return connection.getresponse().status
    return None


def test_a_proxy_starts_without_torch() -> None:
    code = "import sys, pipeline.server.front; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (HEAD, b"X-Line: " + b"a" * 4000 + b"\r\n"),
        (HEAD + b"X-One: ", b"a" * 4000),
        (b"GET /", b"a" * 4000),
    ],
    ids=["lines", "one header", "a path"],
)
def test_a_head_without_end_is_not_kept(
    proxied: tuple[str, int], head: bytes, piece: bytes
) -> None:
    url, proxy = proxied
    before, began = memory(proxy), time.monotonic()
    answer = answer_to_endless(url, head, piece, 100 * MEBIBYTE // len(piece))
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert memory(proxy) - before < 16 * MEBIBYTE
    assert time.monotonic() - began < 20
    assert ask(f"{url}/readyz", token=None)[0] == 200


def test_a_long_head_is_refused_by_the_app(proxied: tuple[str, int]) -> None:
    assert ask(f"{proxied[0]}/v1/tasks", X_Long="a" * 30_000)[0] == 431


def test_more_requests_than_may_wait_are_told_to_come_back(proxied: tuple[str, int]) -> None:
    url, proxy = proxied
    client, image, port = Client(url, TOKEN), png(), int(url.rsplit(":", 1)[1])
    expected, before = client.predict("birds", [image]), memory(proxy)
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + bytes(MEBIBYTE) + b"\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(256):  # each has its replica wait for the rest
            stack.enter_context(half_sent(port, image)[0])
        wait_until(lambda: status_in_a_second(port) is None)
        answer = answer_to_endless(url, chunked, chunk, 100)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
        assert memory(proxy) - before < 64 * MEBIBYTE
        for _ in range(128):  # each waits for a replica
            stack.enter_context(half_sent(port, image)[0])
        time.sleep(2)
        with connected(url) as connection:
            connection.sendall(b"GET /v1/tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = connection.makefile("rb").read().lower()
    assert answer.startswith(b"http/1.1 429"), answer
    assert b"\r\nretry-after: 1\r\n" in answer
    assert b'{"error":"too many requests are waiting; try again later"}' in answer
    wait_until(lambda: status_in_a_second(port) == 200)
    assert client.predict("birds", [image]) == expected


def test_all_that_came_is_answered_before_a_drain_ends() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            while (await receive()).get("more_body"):
                pass
            await PlainTextResponse("done")(scope, receive, send)

    front = Front(slow, Limits(), "the key")
    with listening(front) as port, ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{port}"
        connections = [half_sent(port, png()) for _ in range(3)]
        wait_until(lambda: front._under_way == 3)
        drain("127.0.0.1", port, "another key")
        assert ask(url) == (200, "done")
        drained = pool.submit(drain, "127.0.0.1", port, "the key")
        wait_until(lambda: ask(url)[0] == 503)
        assert not drained.done()
        for connection, rest in connections:
            with connection:
                connection.sendall(rest)
                assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200")
        drained.result(10)


def test_requests_that_wait_for_a_replica_are_answered_when_the_server_ends(
    shop: Shop, tmp_path: Path
) -> None:
    def answers(port: int, sent: list[tuple[socket.socket, bytes]]) -> list[bytes]:
        wait_until(lambda: status_in_a_second(port) == 503)
        for connection, rest in sent:
            connection.sendall(rest)
        return [connection.makefile("rb").read()[:12] for connection, _ in sent]

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        with serving(shop, tmp_path / "log", uuid.uuid4().hex, "--cpus", "0.5") as url:
            port = int(url.rsplit(":", 1)[1])
            sent = [half_sent(port, png()) for _ in range(256 + 40)]
            for connection, _ in sent:
                stack.enter_context(connection)
            wait_until(lambda: status_in_a_second(port) is None)  # a replica has 256 of them
            asked = pool.submit(answers, port, sent)
        assert asked.result(60) == [b"HTTP/1.1 200"] * len(sent)
