"""Hostile requests: each is refused with the right status, and the server goes on unharmed."""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from helpers_server import FORM, TOKEN, ask, form, png

from pipeline.data.images import Images
from pipeline.server.bodies import Asked
from pipeline.server.client import Client
from pipeline.server.decoder import Decoder
from pipeline.server.engine import Engine
from pipeline.server.image_urls import ImageUrls
from pipeline.server.settings import Limits
from pipeline.serving.samples import Decoded

JSON = "application/json"
Served = tuple[str, Engine]


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def png_claiming(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG whose header claims a size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(pixels, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


def raw(url: str, content: bytes) -> int:
    """The status of the answer to bytes sent as they are; 0 where the connection is closed."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=3) as connection:
        try:
            connection.sendall(content)
            answer = connection.recv(4096)
        except (ConnectionError, TimeoutError):
            return 0
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


Answers = dict[str, tuple[set[int], int]]
"""The statuses that are right for each hostile request, and the one of its answer."""
AUTH = f"Authorization: Bearer {TOKEN}\r\n"
HEAD = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\n{AUTH}Content-Type: {JSON}\r\n"


def sent(*arguments: Any, **named: Any) -> int:
    return ask(*arguments, **named)[0]


def refused_requests(url: str) -> Answers:
    one, many = f"{url}/v1/tasks/birds:predict", f"{url}/v1/predict"
    return {
        **refused_tokens_and_sizes(url, one, many),
        **refused_images(one),
        **refused_bodies(url, one, many),
        **refused_names(url, many),
    }


def refused_tokens_and_sizes(url: str, one: str, many: str) -> Answers:
    ok = {"image": b64(png())}
    return {
        "no token": ({401}, sent(one, ok, token=None)),
        "a wrong token": ({401}, sent(one, ok, token="guess")),
        "a token of other bytes": ({401}, sent(one, ok, token="\xff")),
        "no token, unknown address": ({401}, sent(f"{url}/admin", token=None)),
        "a body too large": ({413}, sent(one, {"image": "A" * 300_000})),
        "a large body in chunks": (
            {413},
            raw(
                url,
                f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
                + (b"10000\r\n" + b"A" * 0x10000 + b"\r\n") * 5
                + b"0\r\n\r\n",
            ),
        ),
        "a huge Content-Length": (
            {413, 0},
            raw(url, f"{HEAD}Content-Length: 99999999999999\r\n\r\n".encode()),
        ),
        "a negative Content-Length": (
            {400, 0},
            raw(url, f"{HEAD}Content-Length: -1\r\n\r\n".encode()),
        ),
        "long headers": ({431}, sent(one, ok, X_Long="a" * 10_000)),
        "endless headers": (
            {400, 431, 0},
            raw(url, HEAD.encode() + b"X: " + b"a" * 200_000),
        ),
        "too many images": ({413}, sent(one, {"images": [b64(b"x")] * 40})),
        "too many files": (
            {400},
            sent(one, form([("image", b"x", "x")] * 40), Content_Type=FORM),
        ),
        "too many fields": (
            {400},
            sent(many, form([("task", b"birds", None)] * 40), Content_Type=FORM),
        ),
        "a slow body": ({408}, raw(url, f"{HEAD}Content-Length: 100\r\n\r\n".encode() + b"{")),
    }


def refused_images(one: str) -> Answers:
    return {
        "a bomb": ({413}, sent(one, {"image": b64(png_claiming(60_000, 60_000))})),
        "a smaller bomb": (
            {413},
            sent(one, {"image": b64(png_claiming(2000, 2000, bytes(2000 * 6001)))}),
        ),
        "bombs below the limit": (
            {413},
            sent(one, {"images": [b64(png_claiming(1000, 1000, bytes(1000 * 3001)))] * 3}),
        ),
        "no image": ({422}, sent(one, {"image": b64(b"GIF89a nothing")})),
        "an empty image": ({422}, sent(one, {"image": ""})),
        "half an image": ({422}, sent(one, {"image": b64(png()[:200])})),
        "a script": ({422}, sent(one, {"image": b64(b"<svg onload='x'/>")})),
        "a pickle": ({422}, sent(one, {"image": b64(b"\x80\x04cos\nsystem\n.")})),
        "no base64": ({400}, sent(one, {"image": "not base64!"})),
    }


def refused_bodies(url: str, one: str, many: str) -> Answers:
    image = b64(png())
    return {
        "no JSON": ({400}, sent(one, b"{", Content_Type=JSON)),
        "deep JSON": ({400}, sent(one, b"[" * 999, Content_Type=JSON)),
        "JSON of many values": ({413}, sent(one, b"[" + b"[]," * 50_000, Content_Type=JSON)),
        "another type of image": ({400}, sent(one, {"image": {"path": "/etc/passwd"}})),
        "an address to fetch": ({400}, sent(one, {"url": "http://127.0.0.1:1/"})),
        "no tasks": ({400}, sent(many, {"image": image, "tasks": []})),
        "tasks of another type": ({400}, sent(many, {"image": image, "tasks": [1]})),
        "a type of body unknown": ({415}, sent(one, b"x", Content_Type="text/xml")),
        "a form without its boundary": (
            {400},
            sent(one, b"x", Content_Type="multipart/form-data"),
        ),
        "not HTTP": ({400, 0}, raw(url, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")),
        "an unknown method": (
            {400, 405},
            raw(url, f"BREW /v1/predict HTTP/1.1\r\nHost: x\r\n{AUTH}\r\n".encode()),
        ),
    }


def refused_names(url: str, many: str) -> Answers:
    image = b64(png())
    return {
        "a path as a name": ({400, 404}, sent(f"{url}/v1/tasks/{quote('../../x', safe='')}")),
        "dots as a name": ({404}, sent(many, {"image": image, "tasks": [".."]})),
        "a path in a body": ({400}, sent(many, {"image": image, "tasks": ["../../etc/passwd"]})),
        "a quote in a name": ({400}, sent(many, {"image": image, "tasks": ["x' OR 'a'='a"]})),
        "a long name": ({400}, sent(many, {"image": image, "tasks": ["a" * 5000]})),
        "a NUL in a name": ({400}, sent(f"{url}/v1/tasks/a%00b")),
        "a name that nobody has": ({404}, sent(many, {"image": image, "tasks": ["nobody"]})),
        "a bad limit": ({400}, sent(f"{url}/v1/tasks?limit=1000000")),
        "a limit of another type": ({400}, sent(f"{url}/v1/tasks?limit=x")),
        "a bad place to continue": ({400, 404}, sent(f"{url}/v1/tasks?after=%27")),
    }


def test_hostile_requests_are_refused_and_the_server_goes_on(served: Served) -> None:
    url, _ = served
    client = Client(url, TOKEN)
    expected = client.predict("birds", [png()])
    answers = refused_requests(url)
    assert len(answers) >= 30
    wrong = {name: status for name, (right, status) in answers.items() if status not in right}
    assert wrong == {}
    assert client.predict("birds", [png()]) == expected
    before, threads = resident_bytes(), threading.active_count()
    refused_requests(url)
    assert resident_bytes() - before < 16 * 1024**2
    assert threading.active_count() <= threads + 2
    assert client.predict("birds", [png()]) == expected


def test_answers_never_show_a_traceback(served: Served) -> None:
    url, _ = served
    status, answer = ask(f"{url}/v1/tasks/birds:predict", {"image": b64(png()[:300])})
    assert (status, list(answer)) == (422, ["error"])
    assert "Traceback" not in json.dumps(answer)


def test_few_images_are_decoded_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most = 0, 0
    lock = threading.Lock()

    def slow(content: bytes, number: int, takes: Images) -> Decoded:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return Decoded(np.zeros(1))

    monkeypatch.setattr("pipeline.server.decoder.decoded", slow)
    limits = Limits(decodes=2)
    decoder = Decoder(Images(32), limits, ImageUrls((), limits))
    requests: list[list[Asked]] = [[("birds", png(seed))] for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(decoder.decode, requests))) == 8
    assert most == 2


def test_names_that_do_not_load_leave_nothing_behind(served: Served) -> None:
    url, engine = served
    for name in ("nobody", "no one", "clouds"):
        assert ask(f"{url}/v1/tasks/{quote(name)}:predict", {"image": b64(png())})[0] in (404, 409)
    assert engine.host.packs._loading == {}
