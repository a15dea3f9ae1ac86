"""Many packs on one backbone: what each says, what is kept in memory, what is refused."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_mixed import moved_pack, moved_packs

import pipeline
from pipeline.adaptation import SelectedIndex
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.backbones.known import remember
from pipeline.errors import DataError, PackBackboneMismatch, PackDamaged, PackError, SpecError
from pipeline.packs import Pack, pack_to_bytes, write_pack
from pipeline.serving.host import PackHost
from pipeline.serving.predictor import Predictor
from pipeline.serving.residency import ResidentPacks
from pipeline.specs import Backbone, Task

RECIPES: dict[str, dict[str, Any]] = {
    "connected": {"connections": {"top_k": 2, "bits": 1}, "biases": {"bits": 2}},
    "banked": {"smoa": {"experts": 3, "width": 4}, "norms": {}},
    "tuned": {"full": {"bits": 16}},
    "narrow": {"adapter": {"width": 3, "bits": 1}, "head": {"bits": 1, "rank": 16}},
}


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Backbone, tiny_task: Task) -> LoadedBackbone:
    loaded = load_backbone(tiny_backbone, tiny_task.input)
    remember(loaded.fingerprint, "random")
    return loaded


@pytest.fixture(scope="module")
def packs(
    backbone: LoadedBackbone, tiny_task: Task, random_selection: Callable[..., SelectedIndex]
) -> dict[str, Pack]:
    return moved_packs(backbone, tiny_task, RECIPES, random_selection, top_k=3)


@pytest.fixture
def contents(packs: dict[str, Pack]) -> dict[str, bytes]:
    return {name: pack_to_bytes(pack) for name, pack in packs.items()}


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (count, 40, 48, 3), dtype=np.uint8))


def test_each_request_gets_what_its_pack_says_alone(
    packs: dict[str, Pack], contents: dict[str, bytes], backbone: LoadedBackbone
) -> None:
    host = PackHost(backbone, contents.__getitem__)
    names = [list(packs)[number % len(packs)] for number in (0, 2, 1, 3, 3, 0, 2, 1, 0)]
    images = pictures(len(names))
    found = host.predict(list(zip(names, images, strict=True)))
    for name, pack in packs.items():
        mine = [number for number, each in enumerate(names) if each == name]
        expected = Predictor(pack, backbone).predict([images[number] for number in mine])
        assert [found[number]["label"] for number in mine] == [row["label"] for row in expected]
        assert [found[number]["probability"] for number in mine] == pytest.approx(
            [row["probability"] for row in expected], rel=1e-5
        )
    assert host.predict([]) == []


def test_a_host_in_bfloat16_says_what_each_pack_says_alone_in_bfloat16(
    packs: dict[str, Pack],
    contents: dict[str, bytes],
    backbone: LoadedBackbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packs that share a pass and packs that do not; each is checked in float32."""
    monkeypatch.setattr("pipeline.utils.devices.has_bf16_units", lambda device: True)
    [image], used = pictures(1), list[bool]()
    monkeypatch.setattr(
        "pipeline.serving.host.check_probe", lambda now, pack: used.append(is_rounded(now, pack))
    )

    def is_rounded(now: np.ndarray, pack: Pack) -> bool:
        return not np.allclose(now, pack.probe_logits[: len(now)], rtol=1e-4, atol=1e-4)

    host = PackHost(backbone, contents.__getitem__, device="cpu", precision="bf16")
    found = host.predict([(name, image) for name in packs])
    assert used == [False] * 3
    for pack, row in zip(packs.values(), found, strict=True):
        exact, rounded = (
            Predictor(pack, backbone, "cpu", precision).predict([image])[0]
            for precision in ("fp32", "bf16")
        )
        assert row["label"] == rounded["label"]
        assert row["probability"] == pytest.approx(rounded["probability"], abs=0.01)
        assert rounded["probability"] == pytest.approx(exact["probability"], abs=0.02)
        assert exact["probability"] not in (row["probability"], rounded["probability"])


def test_memory_is_bounded_and_the_least_recently_used_go(
    contents: dict[str, bytes], backbone: LoadedBackbone
) -> None:
    read: list[str] = []

    def reading(name: str) -> bytes:
        read.append(name)
        return contents[name]

    roomy = PackHost(backbone, reading)
    sizes = {name: roomy.packs.get(name).size_bytes for name in ("connected", "banked", "narrow")}
    assert roomy.packs.size_bytes == sum(sizes.values())
    room = sizes["connected"] + sizes["banked"]
    host = PackHost(backbone, reading, capacity_bytes=room)
    read.clear()
    host.packs.get("connected")
    host.packs.get("banked")
    host.packs.get("connected")
    host.packs.get("narrow")
    assert host.packs.names() == ["connected", "narrow"]
    assert host.packs.size_bytes <= room
    [image] = pictures(1)
    assert host.predict([("banked", image)]) == roomy.predict([("banked", image)])
    assert read == ["connected", "banked", "narrow", "banked"]
    assert host.packs.evictions == 2


def test_a_pack_is_renewed_without_a_gap(
    packs: dict[str, Pack], contents: dict[str, bytes], backbone: LoadedBackbone
) -> None:
    host = PackHost(backbone, contents.__getitem__)
    before = host.packs.get("banked")
    contents["banked"] = contents["narrow"]
    assert host.packs.get("banked") is before
    host.packs.renew("banked")
    after = host.packs.get("banked")
    assert (after.digest, len(after.metadata.classes)) == (host.packs.get("narrow").digest, 6)
    contents["banked"] = contents["banked"][:-1]
    with pytest.raises(PackError):
        host.packs.renew("banked")
    assert host.packs.get("banked") is after
    host.packs.forget("banked")
    assert host.packs.size_bytes == host.packs.get("narrow").size_bytes


def test_packs_that_cannot_be_trusted_are_refused_at_load(
    packs: dict[str, Pack],
    contents: dict[str, bytes],
    backbone: LoadedBackbone,
    families: dict[str, Backbone],
    tiny_task: Task,
) -> None:
    damaged = bytearray(contents["banked"])
    damaged[-40] ^= 1
    contents["damaged"] = bytes(damaged)
    wrong = dataclasses.replace(packs["banked"], probe_logits=packs["banked"].probe_logits + 9)
    contents["wrong"] = pack_to_bytes(wrong)
    other = load_backbone(families["swin"], tiny_task.input)
    contents["foreign"] = pack_to_bytes(moved_pack(other, tiny_task, {"norms": {}}))
    host = PackHost(backbone, contents.__getitem__)
    for name, error in (
        ("damaged", PackDamaged),
        ("wrong", PackDamaged),
        ("foreign", PackBackboneMismatch),
    ):
        with pytest.raises(error):
            host.packs.get(name)
    assert host.packs.names() == []
    with pytest.raises(DataError, match=r"request 1: cannot be decoded"):
        host.predict([("banked", pictures(1)[0]), ("banked", b"no image")])


def test_a_file_passes_its_probe_images_once(
    contents: dict[str, bytes], backbone: LoadedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, passes = PackHost(backbone, contents.__getitem__), []
    plain = PackHost.logits

    def counted(self: PackHost, *given: Any) -> Any:
        passes.append(1)
        return plain(self, *given)

    monkeypatch.setattr(PackHost, "logits", counted)
    host.packs.get("banked")
    host.packs.renew("banked")
    assert len(passes) == 1
    contents["banked"] = contents["narrow"]
    host.packs.renew("banked")
    assert len(passes) == 2


def test_a_pack_asked_for_twice_at_once_is_loaded_once() -> None:
    begun, loads = threading.Barrier(2), []

    def load(name: str) -> Any:
        loads.append(name)
        threading.Event().wait(0.1)
        return dataclasses.make_dataclass("Loaded", ["size_bytes"])(1)

    packs = ResidentPacks(load, 10)

    def ask() -> None:
        begun.wait(10)
        packs.get("a")

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert loads == ["a"]


def test_many_packs_are_loaded_by_reference(
    packs: dict[str, Pack], backbone: LoadedBackbone, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("connected", "banked")]
    for path in paths:
        write_pack(path, packs[path.stem])
    host = pipeline.load_many(paths, workdir=tmp_path)
    [image] = pictures(1)
    rows = host.predict([(str(path), image) for path in paths])
    for path, row in zip(paths, rows, strict=True):
        assert row == Predictor(packs[path.stem], backbone).predict([image])[0] | {
            "probability": pytest.approx(row["probability"], rel=1e-5)
        }
    with pytest.raises(PackError, match=r"birds: not among the packs loaded: .*connected"):
        host.predict([("birds", image)])
    with pytest.raises(SpecError, match="given no packs"):
        pipeline.load_many([])
