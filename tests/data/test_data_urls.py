"""Data servers that are slow, broken or away for a moment: what passes is waited for, what does not
is named.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.data import urls
from pipeline.data.urls import fetch, stamp
from pipeline.errors import DataError

# Connections that a test cuts off are closed by the client's own thread, some of them late.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Server(ThreadingHTTPServer):
    """`/flaky` fails twice, then answers; `/silent` accepts and says nothing; `/stalls` sends half;
    `/none` is not there.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.ends = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path == "/silent":
            self.server.ends.wait(30)
        elif self.path == "/none":
            self.send_error(404)
        elif self.path == "/flaky" and len(self.server.asked) < 3:
            self.send_error(503)
        else:
            self._answer()

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"abc")
        self.wfile.flush()
        if self.path == "/stalls":
            self.server.ends.wait(30)
        self.wfile.write(b"def")

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(urls, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(urls, "PAUSES_SECONDS", (0.01, 0.01))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.ends.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_fails_for_a_moment_is_asked_again(server: Server) -> None:
    assert fetch(server.url("/flaky")) == b"abcdef"
    assert server.asked == ["/flaky"] * 3


@pytest.mark.parametrize("path", ["/silent", "/stalls"])
def test_a_server_that_falls_silent_is_given_up_by_name(server: Server, path: str) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"{path}: cannot be read \(no answer within 0\.3 s\)"):
        fetch(server.url(path))
    assert server.asked == [path] * 3
    assert time.monotonic() - started < 15


def test_a_silent_server_is_not_taken_for_a_missing_file(server: Server) -> None:
    with pytest.raises(DataError, match="no answer within"):
        stamp(server.url("/silent"))


def test_a_missing_file_is_asked_for_once(server: Server) -> None:
    with pytest.raises(DataError, match="/none: no such file"):
        fetch(server.url("/none"))
    assert server.asked == ["/none"]
