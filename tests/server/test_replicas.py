"""Replicas under load: one is killed, and no answer is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import COMMAND, environment, free_port
from helpers_server import TOKEN, Shop, png, wait_until

from pipeline.errors import ServerError
from pipeline.server.client import Client
from pipeline.serving.predictor import Predictor

pytest.importorskip("grpc_reflection", reason="the extra serving (ray[serve]) is not installed")
pytestmark = pytest.mark.slow


@contextmanager
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


def replicas_of(mark: str) -> list[int]:
    """The process ids of the replicas that carry a mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            is_replica = b"ServeReplica" in (folder / "cmdline").read_bytes()
            if is_replica and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def test_a_replica_killed_under_load_gives_no_wrong_answer(shop: Shop, tmp_path: Path) -> None:
    images, tasks, mark = [png(seed) for seed in range(4)], list(shop.packs), uuid.uuid4().hex
    expected = {
        (task, number): Predictor(shop.packs[task], shop.backbone, "cpu").predict([image])[0]
        for task in tasks
        for number, image in enumerate(images)
    }
    stopped, failed, answered = threading.Event(), list[str](), list[float]()

    def load(client: Client, start: int) -> None:
        number = start
        while not stopped.is_set():
            number = (number + 1) % len(images)
            try:
                rows = client.predict(tasks, [images[number]])
            except ServerError as error:
                failed.append(str(error))
                continue
            answered.append(time.monotonic())
            for task, row in zip(tasks, rows, strict=True):
                right: dict[str, Any] = expected[task, number]
                assert row["label"] == right["label"]
                assert row["probability"] == pytest.approx(right["probability"], rel=1e-4)

    options = ("--replicas", "2", "--cpus", "0.25")
    with serving(shop, tmp_path / "log", mark, *options) as url, ThreadPoolExecutor(4) as pool:
        before = replicas_of(mark)
        assert len(before) == 2
        loads = [pool.submit(load, Client(url, TOKEN), start) for start in range(4)]
        try:
            wait_until(lambda: len(answered) > 20)
            os.kill(before[0], signal.SIGKILL)
            killed, count = time.monotonic(), len(answered)
            wait_until(lambda: len(answered) > count + 20)
            wait_until(lambda: len({*replicas_of(mark)} - {*before}) == 1, seconds=180)
        finally:
            stopped.set()
        for each in loads:
            each.result(60)
    assert len(failed) <= 4, failed  # one request per client was under way
    said = ("the replica that had this request died; ask again (500)", "(503)", "no answer")
    assert all(any(words in each for words in said) for each in failed), failed
    assert answered[-1] > killed
