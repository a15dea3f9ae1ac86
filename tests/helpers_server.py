"""A server of packs in this process: its registry, and the app behind real sockets."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from helpers_cli import COMMAND, environment, free_port
from PIL import Image

from pipeline.backbones import LoadedBackbone
from pipeline.packs import Pack, content_digest, ledger, pack_to_bytes
from pipeline.registry.pack_record import Champion, RegisteredPack
from pipeline.registry.store import Registry

TOKEN = "let me in"


@dataclass(frozen=True)
class Shop:
    """A registry in a work folder, and the packs of labels and of masks registered in it by name;
    another, `foreign`, is of another backbone.
    """

    workdir: Path
    registry: Registry
    backbone: LoadedBackbone
    packs: dict[str, Pack]
    maps: LoadedBackbone
    masks: dict[str, Pack]


def register_pack(
    registry: Registry,
    folder: Path,
    name: str,
    pack: Pack,
    *,
    promote: bool = False,
    fingerprint: str | None = None,
) -> RegisteredPack:
    """Register a pack as a run does, as good as any other; by default on its own backbone."""
    content = pack_to_bytes(pack)
    path = folder / f"{hashlib.sha256(content).hexdigest()[:12]}.safetensors"
    path.write_bytes(content)
    champion = Champion(
        task=name,
        pack_path=path,
        pack_digest=content_digest(content),
        size_bytes=len(content),
        ledger=ledger(pack),
        metrics={"test_metric": 0.9, "val_metric": 0.9, "trained_values": 10},
        tags={
            "kind": pack.metadata.kind,
            "backbone": "vit_tiny",
            "backbone_fingerprint": fingerprint or pack.metadata.backbone["fingerprint"],
        },
        promote=promote,
    )
    return registry.register(champion, with_trials=False)


def png(seed: int = 0, width: int = 40, height: int = 32) -> bytes:
    """An image file of noise."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def listening(app: Any) -> Iterator[int]:
    """A context in which an ASGI app answers on a port of the loopback interface."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="on")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        assert thread.is_alive(), "the server ended"
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


def ask(
    url: str, body: bytes | Any = None, token: str | None = TOKEN, **headers: str
) -> tuple[int, Any]:
    """Status and content of an answer; what is no bytes is sent as JSON."""
    if body is not None and not isinstance(body, bytes):
        body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(
        url, body, {key.replace("_", "-"): value for key, value in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            status, content = response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            status, content = error.code, error.read()
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content.decode(errors="replace")


def form(fields: list[tuple[str, bytes, str | None]], boundary: str = "xyz") -> bytes:
    """A multipart body of fields: name, content, and the file's name where it is a file."""
    parts = []
    for name, content, file in fields:
        named = f'; filename="{file}"' if file is not None else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        parts.append(head.encode() + content + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


FORM = "multipart/form-data; boundary=xyz"


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Return when a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def serving(shop: Shop, log: Path, mark: str, *options: str) -> Iterator[str]:
    """A context in which `taskpack serve` answers at an address; its processes carry a mark."""
    port = free_port()
    command = [str(COMMAND), "serve", "birds", "--port", str(port), "--workdir", str(shop.workdir)]
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [*command, "--device", "cpu", *options],
            env=environment(TASKPACK_TOKEN=TOKEN, TASKPACK_MARK=mark),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("serving at "), log.read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)


def processes_of(mark: str, actor: str) -> list[int]:
    """The ids of the processes of Ray's actors of this name that carry a mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            is_one = actor.encode() in (folder / "cmdline").read_bytes()
            if is_one and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def half_sent(port: int, image: bytes) -> tuple[socket.socket, bytes]:
    """A connection with the first part of a request of `birds` on it, and the rest of it."""
    body = form([("image", image, "x.png")])
    head = (
        f"POST /v1/tasks/birds:predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: {FORM}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(head.encode() + body[:100])
    return connection, body[100:]
