"""What clients of a server under load see when a replica is killed and when an alias moves."""

from __future__ import annotations

import io
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from runs import SHARED
from serving import RECIPES, backbones, draw_pack, register

from pipeline.backbones import load_backbone
from pipeline.errors import ServerError
from pipeline.registry.store import open_registry
from pipeline.server.client import Client

MARK = "TASKPACK_BENCHMARK"
"""The variable by which the processes of the server are found."""
NEW = "bottleneck, 1 bit"
"""The recipe of the new champion."""
AROUND = 100
"""Answers before and after an event."""
TOLERANCE = 1e-4
PATIENCE_SECONDS = 180


class Clients:
    """Threads that ask for one image of random tasks, each one request after another, while the
    context lasts.
    """

    def __init__(self, port: int, tasks: Sequence[str], count: int) -> None:
        self._port, self._tasks = port, tasks
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(count)]
        self.first: dict[str, dict[str, Any]] = {}
        self.answers: list[tuple[str, dict[str, Any]]] = []
        self.errors: Counter[str] = Counter()

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def warm_up(self) -> None:
        """Wait until each task has been answered."""
        self.wait_until(lambda: len(self.first) == len(self._tasks))
        self.more()

    def more(self) -> None:
        """Wait for some answers more."""
        count = len(self.answers)
        self.wait_until(lambda: len(self.answers) >= count + AROUND)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when a condition holds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.errors
            time.sleep(0.02)

    def begin(self) -> None:
        """Forget what came before an event, but for the first answers."""
        with self._lock:
            self.answers.clear()
            self.errors.clear()

    def row(self, seconds: float, but: str | None = None) -> dict[str, Any]:
        """What came since `begin`; answers for the task `but` may be new ones."""
        with self._lock:
            wrong = sum(
                task != but and not alike(answer, self.first[task]) for task, answer in self.answers
            )
            return {
                "answers": len(self.answers),
                "wrong": wrong,
                "errors": dict(self.errors),
                "seconds": seconds,
            }

    def _ask(self, seed: int) -> None:
        generator, image = random.Random(seed), png()
        client = Client(f"http://127.0.0.1:{self._port}")
        while not self._stopped.is_set():
            task = generator.choice(self._tasks)
            try:
                (found,) = client.predict(task, [image])
            except ServerError as error:
                with self._lock:
                    self.errors[str(error)] += 1
                continue
            with self._lock:
                self.answers.append((task, found))
                self.first.setdefault(task, found)


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two answers are the same but for rounding."""
    near = abs(one["probability"] - other["probability"]) <= TOLERANCE
    return near and one["label"] == other["label"]


def kill_a_replica(clients: Clients, workdir: Path) -> dict[str, Any]:
    """Until another stands in its place and has answered."""
    before = replicas(workdir)
    clients.begin()
    began = time.monotonic()
    os.kill(before[0], signal.SIGKILL)
    clients.wait_until(lambda: len({*replicas(workdir)} - {*before}) == 1)
    seconds = time.monotonic() - began
    clients.more()
    return clients.row(seconds)


def move_an_alias(clients: Clients, workdir: Path, task: str) -> dict[str, Any]:
    """Until the task is answered by its new champion."""
    backbone = load_backbone(*backbones(SHARED)["embedded"])
    content = draw_pack(backbone, RECIPES[NEW], seed=1_000)
    registry = open_registry(f"sqlite:///{workdir}/mlflow.db", workdir)
    clients.begin()
    register(registry, workdir, task, content, promote=True)
    began = time.monotonic()

    def is_live() -> bool:
        answers = [answer for name, answer in list(clients.answers) if name == task]
        return any(not alike(answer, clients.first[task]) for answer in answers)

    clients.wait_until(is_live)
    seconds = time.monotonic() - began
    clients.more()
    return clients.row(seconds, but=task)


def replicas(workdir: Path) -> list[int]:
    """The process ids of the replicas of a server with this mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            is_replica = b"ServeReplica" in (folder / "cmdline").read_bytes()
            if is_replica and f"{MARK}={workdir}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def png() -> bytes:
    """An image of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
