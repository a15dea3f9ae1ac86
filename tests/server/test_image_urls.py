"""Images named by URL: read from the allowed places alone, within the limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from helpers_server import TOKEN, Shop, ask, listening, png

from pipeline.errors import ServerError, SpecError
from pipeline.server.client import Client
from pipeline.server.image_urls import check_place

LIMIT_BYTES = 50_000
IMAGE = png()


class Pictures(BaseHTTPRequestHandler):
    """A site with one picture, and what a site may do to whoever reads it."""

    asked: list[str] = []  # noqa: RUF012 - one list for all requests

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/cats/moved.png":
            self.send_response(302)
            self.send_header("Location", "/secret/cat.png")
            return self.end_headers()
        if self.path == "/cats/gone.png":
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        if self.path == "/cats/large.png":
            self.wfile.write(b"x" * (LIMIT_BYTES + 1))
        elif self.path == "/cats/slow.png":
            for _ in range(10):
                self.wfile.write(b"x")
                time.sleep(0.1)
        else:
            self.wfile.write(IMAGE)

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def reader(shop: Shop, site: str) -> Iterator[str]:
    """The address of a server that reads images from one folder of the site."""
    from pipeline.server.app import build_app
    from pipeline.server.engine import Engine
    from pipeline.server.settings import Limits, Settings

    limits = Limits(request_bytes=LIMIT_BYTES, body_seconds=0.5)
    given = Settings(
        shop.workdir, ("birds",), token=TOKEN, images_from=(f"{site}/cats/",), limits=limits
    )
    with listening(build_app(Engine(given))) as port:
        yield f"http://127.0.0.1:{port}"


def answer_to(server: str, url: str) -> tuple[int, str]:
    status, content = ask(f"{server}/v1/tasks/birds:predict", {"image": {"url": url}})
    return status, content["error"] if status != 200 else ""


def test_an_image_is_read_once_for_all_tasks(reader: str, site: str) -> None:
    Pictures.asked.clear()
    client, url = Client(reader, TOKEN), f"{site}/cats/cat.png?size=1"
    assert client.predict(["birds", "flowers"], [url, IMAGE, url]) == client.predict(
        ["birds", "flowers"], [IMAGE] * 3
    )
    assert Pictures.asked == ["/cats/cat.png?size=1"]


def test_what_is_no_image_of_an_allowed_place_is_refused(reader: str, site: str) -> None:
    Pictures.asked.clear()
    host = site.removeprefix("http://")
    outside = {
        f"{site}/secret/cat.png": (403, "reads no images from there"),
        f"{site}/cats": (403, "reads no images from there"),
        f"{site}/cats/../secret/cat.png": (400, "not a plain URL"),
        f"{site}/cats/%2e%2e/secret/cat.png": (400, "not a plain URL"),
        f"{site}/cats/..%2Fsecret/cat.png": (400, "not a plain URL"),
        f"{site}/cats/..\\secret/cat.png": (400, "not a plain URL"),
        f"{site}/cats/a b.png": (400, "not a plain URL"),
        f"http://{host}.evil.example/cats/cat.png": (403, "reads no images from there"),
        f"http://{host}@evil.example/cats/cat.png": (403, "reads no images from there"),
        f"http://user@{host}/cats/cat.png": (403, "reads no images from there"),
        f"https://{host}/cats/cat.png": (403, "reads no images from there"),
        "file:///etc/passwd": (403, "reads no images from there"),
        "http://[": (400, "not a URL"),
        "": (403, "reads no images from there"),
    }
    for url, (status, said) in outside.items():
        found = answer_to(reader, url)
        assert found[0] == status, (url, found)
        assert said in found[1], (url, found)
    assert Pictures.asked == [], "nothing was asked for"
    inside = {
        "moved.png": (422, "its URL gave a redirect"),
        "gone.png": (422, "its URL gave status 404"),
        "large.png": (413, f"more than {LIMIT_BYTES} bytes at its URL"),
        "slow.png": (408, "not read within 0.5 s"),
    }
    for name, (status, said) in inside.items():
        found = answer_to(reader, f"{site}/cats/{name}")
        assert found[0] == status, (name, found)
        assert said in found[1], (name, found)
    assert "/secret/cat.png" not in Pictures.asked
    assert answer_to(reader, f"{site}/cats/cat.png") == (200, "")


def test_a_site_that_does_not_answer_is_named_as_that(shop: Shop) -> None:
    from pipeline.server.guard import Refused
    from pipeline.server.image_urls import ImageUrl, ImageUrls
    from pipeline.server.settings import Limits

    urls = ImageUrls(("http://127.0.0.1:9/",), Limits())
    with pytest.raises(Refused, match="image 3: its URL cannot be read"):
        urls.read(ImageUrl("http://127.0.0.1:9/a.png"), 3, time.monotonic() + 2)


def test_a_server_without_places_reads_no_url(served: Any, site: str) -> None:
    with pytest.raises(ServerError, match="this server reads no URLs; send the image itself"):
        Client(served[0], TOKEN).predict("birds", [f"{site}/cats/cat.png"])


def test_a_place_is_a_folder_of_a_host() -> None:
    for place in ("https://images.example/", "http://127.0.0.1:8080/cats/"):
        assert check_place(place) == place
    for place in (
        "images.example/cats/",
        "https://images.example",
        "https://images.example/cats",
        "https:///cats/",
        "ftp://images.example/",
        "https://user@images.example/",
        "https://images.example/?a=/",
        "https://images.example:port/",
        "file:///etc/",
    ):
        with pytest.raises(SpecError, match="--images-from: given"):
            check_place(place)
