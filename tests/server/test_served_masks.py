"""The server's masks: those of `Predictor`, alone and beside labels, and within its limits."""

from __future__ import annotations

import base64
import dataclasses
import io
import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from helpers_server import FORM, TOKEN, Shop, ask, form, png
from PIL import Image

from pipeline.errors import ServerError
from pipeline.server.batcher import Busy
from pipeline.server.client import Client
from pipeline.server.engine import Engine
from pipeline.server.metrics import as_text
from pipeline.server.settings import Limits, Settings
from pipeline.serving.host import PackHost
from pipeline.serving.predictor import Predictor
from pipeline.serving.samples import Decoded

Served = tuple[str, Engine]


def expected(shop: Shop, task: str, image: bytes) -> dict[str, Any]:
    if task in shop.masks:
        return {"task": task, **Predictor(shop.masks[task], shop.maps, "cpu").predict([image])[0]}
    [row] = Predictor(shop.packs[task], shop.backbone, "cpu").predict([image])
    return {"task": task, **row, "probability": pytest.approx(row["probability"], rel=1e-4)}


def test_masks_are_those_of_the_predictor_beside_labels(shop: Shop, served: Served) -> None:
    tasks = ["regions", "birds", "surfaces", "tools", "regions@champion"]
    images = [png(1, 40, 32), png(2, 300, 7)]
    rows = Client(served[0], TOKEN).predict(tasks, images)
    for row, (image, task) in zip(rows, [(i, t) for i in images for t in tasks], strict=True):
        assert row == expected(shop, task.split("@")[0], image) | {"task": task}
    masks = [np.asarray(Image.open(io.BytesIO(row["mask"]))) for row in rows if "mask" in row]
    assert [mask.shape for mask in masks] == [(32, 40)] * 3 + [(7, 300)] * 3
    assert len(np.unique(masks[0])) > 1


def test_a_mask_comes_as_base64_in_json(shop: Shop, served: Served) -> None:
    image = png(3)
    body = form([("image", image, "a.png"), ("image", png(4), "b.png")])
    status, answer = ask(f"{served[0]}/v1/tasks/regions:predict", body, Content_Type=FORM)
    assert status == 200
    for row, each in zip(answer["predictions"], (image, png(4)), strict=True):
        right = expected(shop, "regions", each)
        assert row == right | {"mask": base64.b64encode(right["mask"]).decode()}
        assert list(row["areas"]) == shop.masks["regions"].metadata.classes
    status, described = ask(f"{served[0]}/openapi.json")
    answers = described["paths"]["/v1/predict"]["post"]["responses"]["200"]["content"]
    schema = answers["application/json"]["schema"]["properties"]["predictions"]["items"]
    assert {*row, *expected(shop, "birds", image)} <= schema["properties"].keys()


def test_tasks_with_masks_are_listed_and_shown_with_their_classes(
    shop: Shop, served: Served
) -> None:
    client = Client(served[0], TOKEN)
    kinds = {task["name"]: task["kind"] for task in client.tasks()["tasks"]}
    assert (kinds["regions"], kinds["birds"]) == ("segmentation", "classification")
    client.predict("regions", [png()])
    assert client.task("regions")["classes"] == shop.masks["regions"].metadata.classes


def test_a_server_may_begin_with_masks(shop: Shop, settings: Settings) -> None:
    engine = Engine(dataclasses.replace(settings, tasks=("surfaces", "birds")))
    assert engine.host.backbone.gives_maps
    sample = Decoded(*engine.images.decode_sized(png(5)))
    futures = engine.submit([("surfaces", sample), ("birds", sample), ("regions", sample)])
    rows = [
        {"task": name, **future.result(30)}
        for name, future in zip(("surfaces", "birds", "regions"), futures, strict=True)
    ]
    assert rows == [expected(shop, row["task"], png(5)) for row in rows]
    engine.close()


def test_large_masks_are_refused_and_labels_of_the_same_images_are_not(served: Served) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1000, 900)).save(buffer, "PNG")
    client, images = Client(served[0], TOKEN), [buffer.getvalue()] * 3
    assert len(client.predict("regions", images[:2])) == 2
    for tasks, sent in (("regions", images), (["regions", "surfaces"], images[:2])):
        with pytest.raises(ServerError, match=r"masks of .* at most 2,000,000 at once.*\(413\)"):
            client.predict(tasks, sent)
    assert len(client.predict(["birds", "regions"], images[:2])) == 4
    assert len(client.predict("birds", images)) == 3


def test_labels_are_answered_while_a_mask_takes_long(
    shop: Shop, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    plain = PackHost._masks

    def slow(self: PackHost, *given: Any) -> Any:
        begun.set()
        assert may_end.wait(30)
        return plain(self, *given)

    monkeypatch.setattr(PackHost, "_masks", slow)
    engine = Engine(settings)
    sample = Decoded(*engine.images.decode_sized(png()))
    mask: Future[dict[str, Any]]
    [label, mask] = engine.submit([("birds", sample), ("regions", sample)])
    assert begun.wait(30)
    assert label.result(30)["label"]
    assert engine.submit([("birds", sample)])[0].result(30)["label"]
    assert not mask.done()
    may_end.set()
    assert mask.result(30)["mask"]
    engine.close()


def test_a_request_waits_whole_or_not_at_all(shop: Shop, settings: Settings) -> None:
    limits = Limits(waiting_images=2)
    engine = Engine(dataclasses.replace(settings, limits=limits, wait_seconds=30))
    sample = Decoded(*engine.images.decode_sized(png()))
    with pytest.raises(Busy):
        engine.submit([("birds", sample), *[("regions", sample)] * 3])
    [label] = engine.submit([("birds", sample)])
    engine.close()
    assert label.result(0)["label"]
    counted = as_text({"one": engine.counted()}).decode()
    assert 'taskpack_batch_images_sum{replica="one"} 1.0' in counted
