"""One image, all tasks: `taskpack predict --all` and `pipeline.load_all`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers_cli import taskpack
from helpers_mixed import moved_pack
from helpers_server import Shop, png, register_pack

import pipeline
from pipeline.errors import RegistryError
from pipeline.registry.store import open_registry
from pipeline.server.engine import Engine
from pipeline.server.settings import Settings
from pipeline.serving.predictor import Predictor
from pipeline.specs import Task


def test_one_image_is_predicted_for_every_task(shop: Shop, tiny_task: Task, tmp_path: Path) -> None:
    late = moved_pack(shop.backbone, tiny_task, {"lora": {"rank": 2}, "from_block": 1}, seed=40)
    damaged = dataclasses.replace(late, probe_logits=late.probe_logits + 1)
    packs, registry = {**shop.packs, "late": late}, open_registry(None, tmp_path)
    for name, pack in {**packs, **shop.masks, "damaged": damaged}.items():
        register_pack(registry, tmp_path, name, pack)
    register_pack(registry, tmp_path, "foreign", late, fingerprint="f" * 64)
    images = [tmp_path / f"{number}.png" for number in range(2)]
    for number, image in enumerate(images):
        image.write_bytes(png(number))
    host, refused = pipeline.load_all(workdir=tmp_path, device="cpu")
    assert {*packs, *shop.masks} == {*host.packs.names()}
    assert refused.keys() == {"damaged"}
    assert "probe logits differ" in refused["damaged"]

    run = taskpack("predict", "--all", *images, "--workdir", tmp_path, "--json")
    rows = {(row["image"], row["task"]): row for row in run.json()}
    assert "damaged: left out: " in run.err
    assert len(rows) == (len(packs) + len(shop.masks)) * len(images)
    for name, pack in shop.masks.items():
        masks = Predictor(pack, shop.maps, "cpu").predict(images)
        for image, right in zip(images, masks, strict=True):
            asked = {"image": str(image), "task": name}
            assert rows[str(image), name] == asked | {"areas": right["areas"]}
    for name, pack in packs.items():
        for image, expected in zip(
            images, Predictor(pack, shop.backbone, "cpu").predict(images), strict=True
        ):
            row = rows[str(image), name]
            assert row["label"] == expected["label"]
            assert row["probability"] == pytest.approx(expected["probability"], rel=1e-4)
    shown = taskpack("predict", "--all", images[0], "--workdir", tmp_path).out
    assert all(name in shown for name in (*packs, *shop.masks))
    share = max(rows[str(images[0]), "regions"]["areas"].values())
    assert f"{share:.3f}" in shown


def test_commands_and_servers_compute_in_the_precision_asked_for(
    shop: Shop, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.utils.devices.has_bf16_units", lambda device: True)
    image, shares = tmp_path / "image.png", dict[str, list[float]]()
    image.write_bytes(png(3))
    registry = open_registry(None, tmp_path)
    for name, pack in shop.packs.items():
        register_pack(registry, tmp_path, name, pack)
    for precision in ("fp32", "bf16"):
        asked = (image, "--precision", precision, "--device", "cpu", "--workdir", tmp_path)
        [one] = taskpack("predict", "birds", *asked, "--json").json()
        every = taskpack("predict", "--all", *asked, "--json").json()
        engine = Engine(dataclasses.replace(settings, workdir=tmp_path, precision=precision))
        [served] = engine.host.predict([("birds", image)])
        engine.close()
        rows = (one, *(row for row in every if row["task"] == "birds"), served)
        shares[precision] = [row["probability"] for row in rows]
    assert shares["fp32"] == pytest.approx([shares["fp32"][0]] * 3, rel=1e-5)
    assert shares["bf16"] == pytest.approx(shares["fp32"], abs=0.02)
    assert shares["bf16"] != pytest.approx(shares["fp32"], rel=1e-5)


def test_what_cannot_be_asked_is_refused(shop: Shop, tmp_path: Path) -> None:
    open_registry(None, tmp_path)
    with pytest.raises(RegistryError, match="no champion that shares a backbone"):
        pipeline.load_all(workdir=tmp_path)
    for arguments, said in (
        (("predict", "birds"), "given no image"),
        (("predict", "--all", "x.png", "--out", tmp_path / "masks"), "the masks of one pack"),
    ):
        answer = taskpack(*arguments, "--workdir", shop.workdir)
        assert answer.code == 2
        assert said in " ".join(answer.err.split())
