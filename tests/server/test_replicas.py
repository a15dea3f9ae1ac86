"""Replicas under load: one is killed, and no answer is wrong."""

from __future__ import annotations

import functools
import os
import re
import signal
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers_server import TOKEN, Shop, ask, png, processes_of, serving, wait_until

from pipeline.errors import ServerError
from pipeline.server.client import Client
from pipeline.serving.predictor import Predictor

pytest.importorskip("grpc_reflection", reason="the extra serving (ray[serve]) is not installed")
pytestmark = pytest.mark.slow


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
        replicas = functools.partial(processes_of, mark, "ServeReplica")
        before = replicas()
        assert len(before) == 2
        loads = [pool.submit(load, Client(url, TOKEN), start) for start in range(4)]
        try:
            wait_until(lambda: len(answered) > 20)
            os.kill(before[0], signal.SIGKILL)
            killed, count = time.monotonic(), len(answered)
            wait_until(lambda: len(answered) > count + 20)
            wait_until(
                lambda: len({*processes_of(mark, "ServeReplica")} - {*before}) == 1, seconds=180
            )
        finally:
            stopped.set()
        for each in loads:
            each.result(60)
    assert len(failed) <= 4, failed  # one request per client was under way
    said = ("the replica that had this request died; ask again (500)", "(503)", "no answer")
    assert all(any(words in each for words in said) for each in failed), failed
    assert answered[-1] > killed


def test_every_answer_of_metrics_counts_all_replicas(shop: Shop, tmp_path: Path) -> None:
    options = ("--replicas", "2", "--cpus", "0.25")
    with serving(shop, tmp_path / "log", uuid.uuid4().hex, *options) as url:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(24):
                pool.submit(Client(url, TOKEN).predict, "birds", [png()])
        for _ in range(8):
            status, text = ask(f"{url}/metrics")
            assert status == 200
            found = re.findall(
                r'^taskpack_images_total{replica="(\w+)",task="birds"} (\S+)', text, re.M
            )
            assert len({replica for replica, _ in found}) == 2
            assert sum(float(count) for _, count in found) == 24
            assert text.count("# TYPE taskpack_images_total counter") == 1
