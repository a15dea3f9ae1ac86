"""The server: what it answers, by task and for many tasks at once, and how it follows aliases."""

from __future__ import annotations

import base64
import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers_mixed import moved_pack
from helpers_server import FORM, TOKEN, Shop, ask, form, listening, png, register_pack

from pipeline.errors import BackboneError, RegistryError, ServerError, SpecError
from pipeline.packs import Calibration
from pipeline.registry.store import open_registry
from pipeline.server.app import build_app
from pipeline.server.batcher import Batcher, Busy, Closed
from pipeline.server.client import Client
from pipeline.server.deployment import running
from pipeline.server.engine import Engine
from pipeline.server.settings import Settings
from pipeline.serving.predictor import Predictor
from pipeline.serving.samples import Decoded
from pipeline.specs import Task

Served = tuple[str, Engine]


def expected(shop: Shop, task: str, image: bytes) -> dict[str, Any]:
    [row] = Predictor(shop.packs[task], shop.backbone, "cpu").predict([image])
    return {"task": task, **row, "probability": pytest.approx(row["probability"], rel=1e-4)}


def test_one_task_is_predicted_from_json_and_from_a_form(shop: Shop, served: Served) -> None:
    url, image = f"{served[0]}/v1/tasks/flowers:predict", png(1)
    status, answer = ask(url, {"image": base64.b64encode(image).decode()})
    assert (status, answer["predictions"]) == (200, [expected(shop, "flowers", image)])
    assert answer["seconds"] > 0
    body = form([("image", image, "a.png"), ("image", png(2), "b.png")])
    status, answer = ask(url, body, Content_Type=FORM)
    assert status == 200
    assert answer["predictions"] == [expected(shop, "flowers", each) for each in (image, png(2))]


def test_many_tasks_are_predicted_in_one_request(shop: Shop, served: Served) -> None:
    client = Client(served[0], TOKEN)
    images, tasks = [png(seed) for seed in range(3)], list(shop.packs)
    assert client.predict(tasks, images) == [
        expected(shop, task, image) for image in images for task in tasks
    ]
    pairs = [("tools", images[0]), ("birds@champion", images[1])]
    content = [{"task": task, "image": base64.b64encode(each).decode()} for task, each in pairs]
    status, answer = ask(f"{served[0]}/v1/predict", {"requests": content})
    assert status == 200
    assert answer["predictions"][0] == expected(shop, "tools", images[0])
    assert answer["predictions"][1] == expected(shop, "birds", images[1]) | {
        "task": "birds@champion"
    }
    body = form([("task", b"birds", None), ("task", b"tools", None), ("image", images[0], "a")])
    status, answer = ask(f"{served[0]}/v1/predict", body, Content_Type=FORM)
    assert answer["predictions"] == [expected(shop, name, images[0]) for name in ("birds", "tools")]


def test_concurrent_requests_share_batches_and_get_their_own_answers(
    shop: Shop, served: Served
) -> None:
    client, image = Client(served[0], TOKEN), png(5)
    alone = {task: expected(shop, task, image) for task in shop.packs}
    tasks = list(shop.packs) * 8
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda task: client.predict(task, [image]), tasks))
    assert answers == [[alone[task]] for task in tasks]


def test_tasks_are_listed_and_shown(shop: Shop, served: Served) -> None:
    client = Client(served[0], TOKEN)
    first = client.tasks(limit=2)
    rest = client.tasks(limit=9, after=first["next"])
    listed = [task["name"] for page in (first, rest) for task in page["tasks"]]
    assert sorted(listed) == sorted([*shop.packs, *shop.masks])
    assert rest["next"] is None
    shown = client.task("birds")
    assert (shown["version"], shown["test_metric"]) == (1, 0.9)
    assert sum(shown["bytes"].values()) - shown["bytes"].get("size", 0) == shown["size_bytes"]
    with pytest.raises(ServerError, match=r"did you mean birds\? \(404\)"):
        client.task("birdz")
    with pytest.raises(ServerError, match=r"no valid token.* \(401\)"):
        Client(served[0]).tasks()
    with pytest.raises(ServerError, match="is the server running"):
        Client("http://127.0.0.1:9").tasks()


def test_pages_of_tasks_are_full_up_to_the_last(
    shop: Shop, settings: Settings, tmp_path: Path
) -> None:
    """Versions that are no champion take no place on a page."""
    registry, packs = open_registry(None, tmp_path), list(shop.packs.values())
    for version in range(2):
        for number, name in enumerate(shop.packs, version):
            register_pack(registry, tmp_path, name, packs[number % len(packs)], promote=True)
    engine = Engine(dataclasses.replace(settings, workdir=tmp_path))
    with listening(build_app(engine)) as port:
        client = Client(f"http://127.0.0.1:{port}", TOKEN)
        names = [task["name"] for task in client.tasks()["tasks"]]
        assert sorted(names) == sorted(shop.packs)
        for limit in range(1, len(names) + 2):
            pages, after = [], None
            while True:
                page = client.tasks(limit, after)
                pages.append([task["name"] for task in page["tasks"]])
                if (after := page["next"]) is None:
                    break
            assert pages == [names[at : at + limit] for at in range(0, len(names), limit)]


def test_sets_have_their_coverage(shop: Shop, served: Served, tiny_task: Task) -> None:
    plain = moved_pack(shop.backbone, tiny_task, {"norms": {}}, seed=50)
    pack = dataclasses.replace(plain, calibration=Calibration(0.8, 400, 2.5, 0.3))
    register_pack(shop.registry, shop.workdir, "sure", pack)
    client = Client(served[0], TOKEN)
    assert client.task("sure")["coverage"] is None, "it is not loaded"
    sure, unsure = client.predict(["sure", "birds"], [png()])
    [right] = Predictor(pack, shop.backbone, "cpu").predict([png()])
    assert (sure["set"], sure["coverage"]) == (right["set"], 0.8)
    assert not {"set", "coverage"} & unsure.keys()
    assert (client.task("sure")["coverage"], client.task("birds")["coverage"]) == (0.8, None)


def test_health_metrics_and_the_interface_are_described(served: Served) -> None:
    url, _ = served
    for path in ("healthz", "readyz"):
        assert ask(f"{url}/{path}", token=None) == (200, {"status": "ok"})
    Client(url, TOKEN).predict("birds", [png()])
    ask(f"{url}/v1/tasks/nobody", None)
    for name in ("birds", "nobody"):
        assert ask(
            f"{url}/v1/tasks/{name}:predict", form([("image", b"x", "x")]), Content_Type=FORM
        )
    status, text = ask(f"{url}/metrics")
    assert status == 200
    for line in (
        'taskpack_images_total{replica="0",task="birds"}',
        'taskpack_requests_total{replica="0",status="404"}',
        'taskpack_task_errors_total{replica="0",task="birds"} 1.0',
        'taskpack_task_seconds_bucket{le="0.5",replica="0",task="birds"}',
        "taskpack_batch_images_count",
        "taskpack_resident_packs",
    ):
        assert line in text, line
    assert "nobody" not in text
    status, described = ask(f"{url}/openapi.json")
    assert {"/v1/predict", "/v1/tasks", "/v1/tasks/{name}:predict"} <= described["paths"].keys()
    body = described["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert body.keys() == {"application/json", "multipart/form-data"}


def test_a_moved_alias_is_live_within_seconds_and_no_request_is_lost(
    shop: Shop, served: Served, tiny_task: Task
) -> None:
    client, image = Client(served[0], TOKEN), png(3)
    before = moved_pack(shop.backbone, tiny_task, {"norms": {}}, seed=20)
    after = moved_pack(shop.backbone, tiny_task, {"lora": {"rank": 2}}, classes=7, seed=21)
    register_pack(shop.registry, shop.workdir, "moving", before)
    probabilities = {
        version: Predictor(pack, shop.backbone, "cpu").predict([image])[0]["probability"]
        for version, pack in ((1, before), (2, after))
    }
    found: list[float] = []
    stopped = threading.Event()

    def load() -> None:
        while not stopped.is_set():
            found.append(client.predict("moving", [image])[0]["probability"])

    with ThreadPoolExecutor(1) as pool:
        running_load = pool.submit(load)
        try:
            time.sleep(0.3)
            register_pack(shop.registry, shop.workdir, "moving", after, promote=True)
            moved, deadline = time.monotonic(), time.monotonic() + 10
            while found[-1] != pytest.approx(probabilities[2], rel=1e-4):
                assert time.monotonic() < deadline, "the alias was not followed"
                time.sleep(0.02)
            took = time.monotonic() - moved
        finally:
            stopped.set()
            running_load.result(30)
    assert took < 5
    known = [pytest.approx(each, rel=1e-4) for each in probabilities.values()]
    assert all(each in known for each in found)
    assert client.task("moving")["version"] == 2


def test_a_champion_that_cannot_be_used_changes_nothing_and_holds_up_nobody(
    shop: Shop, settings: Settings, tiny_task: Task
) -> None:
    engine = Engine(dataclasses.replace(settings, poll_seconds=3600))
    for name in ("broken", "sound"):  # the broken one is the first to be loaded again
        first = moved_pack(shop.backbone, tiny_task, {"norms": {}}, seed=30)
        register_pack(shop.registry, shop.workdir, name, first)
        engine.host.packs.get(name)
    before = engine.host.packs.get("broken")
    second = moved_pack(shop.backbone, tiny_task, {"norms": {}}, classes=4, seed=31)
    logits = second.probe_logits + 1
    wrong = dataclasses.replace(second, probe_logits=logits)
    register_pack(shop.registry, shop.workdir, "broken", wrong, promote=True)
    register_pack(shop.registry, shop.workdir, "sound", second, promote=True)
    assert sorted(engine.catalogue.moved(engine.host.packs.names())) == ["broken", "sound"]
    assert engine.renew() == ["sound"]
    assert engine.served("sound").version == 2
    assert engine.served("broken").version == 1
    assert engine.host.packs.get("broken") is before
    assert engine.renew() == [], "a version that cannot be used is not read again"
    register_pack(shop.registry, shop.workdir, "broken", second, promote=True)
    assert engine.renew() == ["broken"]
    assert engine.served("broken").version == 3
    engine.close()


def test_too_many_images_are_refused_and_later_ones_served(shop: Shop, settings: Settings) -> None:
    engine = Engine(settings)
    engine._batcher.close()
    pack, image = engine.host.packs.get("birds"), engine.host.backbone.size_px
    batcher = Batcher(engine.host, batch_images=4, wait_seconds=0.5, most_waiting=3)
    import numpy as np

    array = Decoded(np.zeros((3, image, image), np.uint8))
    waiting = batcher.submit([(pack, array)] * 2)
    with pytest.raises(Busy, match="2 images are waiting; at most 3 may"):
        batcher.submit([(pack, array)] * 2)
    cancelled = batcher.submit([(pack, array)])[0]
    assert cancelled.cancel()
    batcher.close()
    assert [future.result(0)["label"] for future in waiting]
    with pytest.raises(Closed):
        batcher.submit([(pack, array)])
    with pytest.raises(Closed):
        engine.submit([("birds", array)])
    engine.close()


def test_requests_under_way_are_answered_when_the_server_ends(
    shop: Shop, settings: Settings
) -> None:
    engine = Engine(dataclasses.replace(settings, wait_seconds=0.5))
    with listening(build_app(engine)) as port, ThreadPoolExecutor(1) as pool:
        client = Client(f"http://127.0.0.1:{port}", TOKEN)
        asked = pool.submit(client.predict, "birds", [png()])
        deadline = time.monotonic() + 10
        while not engine._batcher.waiting and not asked.done():
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert asked.result(10)[0]["task"] == "birds"


def test_packs_of_point_clouds_are_not_served(
    shop: Shop, settings: Settings, served: Served
) -> None:
    with pytest.raises(BackboneError, match="clouds: its backbone takes points, and the server"):
        Engine(dataclasses.replace(settings, tasks=("clouds",)))
    image = {"image": base64.b64encode(png()).decode()}
    status, answer = ask(f"{served[0]}/v1/tasks/clouds:predict", image)
    assert (status, "needs the backbone point_mae" in str(answer)) == (409, True), answer


def test_bad_settings_are_refused(tmp_path: Any, shop: Shop) -> None:
    open_registry(None, tmp_path)
    with pytest.raises(RegistryError, match="no pack whose backbone could be served"):
        Engine(Settings(tmp_path))
    with (
        pytest.raises(SpecError, match=r"--host: given '0\.0\.0\.0'.* without a token"),
        running(Settings(tmp_path), host="0.0.0.0", port=1, replicas=1, cpus=1, gpus=0, key=""),
    ):
        raise AssertionError
