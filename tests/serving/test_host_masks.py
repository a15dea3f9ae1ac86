"""Packs of masks on the host: the masks of `Predictor`, bit for bit, beside packs of labels; what
they take in memory.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers_mixed import moved_pack, moved_packs, of_masks
from PIL import Image
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.adaptation import AdaptedModel, SelectedIndex
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.backbones.known import remember
from pipeline.errors import PackBackboneMismatch, PackDamaged
from pipeline.packs import Pack, pack_to_bytes
from pipeline.serving import host as host_module
from pipeline.serving.host import PackHost
from pipeline.serving.masks import class_mask
from pipeline.serving.predictor import Predictor
from pipeline.specs import Backbone, Task

RECIPES: dict[str, dict[str, Any]] = {
    "connected": {"connections": {"top_k": 2, "bits": 1}, "biases": {"bits": 2}},
    "banked": {"smoa": {"experts": 3, "width": 4}, "norms": {}, "head": {"fuse": 4}},
    "tuned": {"full": {"bits": 16}},
    "low": {"lora": {"rank": 2}},
}
LABELS: dict[str, Any] = {"adapter": {"width": 3, "bits": 1}}


@pytest.fixture(scope="module")
def pooling(tiny_backbone: Backbone, tiny_task: Task) -> LoadedBackbone:
    loaded = load_backbone(tiny_backbone, tiny_task.input)
    remember(loaded.fingerprint, "random")
    return loaded


@pytest.fixture(scope="module")
def maps(tiny_backbone: Backbone, tiny_task: Task) -> LoadedBackbone:
    return load_backbone(tiny_backbone, tiny_task.input, gives_maps=True)


@pytest.fixture(scope="module")
def packs(
    maps: LoadedBackbone, tiny_task: Task, random_selection: Callable[..., SelectedIndex]
) -> dict[str, Pack]:
    return moved_packs(maps, of_masks(tiny_task), RECIPES, random_selection, top_k=3)


@pytest.fixture(scope="module")
def labels(pooling: LoadedBackbone, tiny_task: Task) -> Pack:
    return moved_pack(pooling, tiny_task, LABELS, seed=9)


@pytest.fixture
def contents(packs: dict[str, Pack], labels: Pack) -> dict[str, bytes]:
    return {name: pack_to_bytes(pack) for name, pack in {**packs, "labels": labels}.items()}


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Noise of some pixels' extent, so that its mask has many regions."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height)))


@pytest.mark.parametrize("is_mapping_first", [False, True])
def test_each_request_gets_the_mask_of_its_pack_alone_bit_for_bit(
    packs: dict[str, Pack],
    labels: Pack,
    contents: dict[str, bytes],
    pooling: LoadedBackbone,
    maps: LoadedBackbone,
    is_mapping_first: bool,
) -> None:
    host = PackHost(maps if is_mapping_first else pooling, contents.__getitem__, device="cpu")
    images = [picture(seed, 40 + 17 * seed, 90 - 9 * seed) for seed in range(5)]
    names = [*packs, "labels"]
    asked = [(name, image) for image in images for name in names]
    order = np.random.default_rng(1).permutation(len(asked))
    found = host.predict([asked[number] for number in order])
    rows = {int(number): row for number, row in zip(order, found, strict=True)}
    for place, name in enumerate(names):
        mine = [rows[number * len(names) + place] for number in range(len(images))]
        if name == "labels":
            expected = Predictor(labels, pooling, "cpu").predict(images)
            assert [row["label"] for row in mine] == [row["label"] for row in expected]
            continue
        assert mine == Predictor(packs[name], maps, "cpu").predict(images)
        masks = [np.asarray(Image.open(io.BytesIO(row["mask"]))) for row in mine]
        assert [mask.shape for mask in masks] == [image.shape[:2] for image in images]
        assert any(len(np.unique(mask)) > 1 for mask in masks)


def test_few_logits_are_kept_at_a_time(
    packs: dict[str, Pack],
    contents: dict[str, bytes],
    pooling: LoadedBackbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_module, "_LOGITS_BYTES", 2 * 4 * 3 * 32 * 32)
    merged: list[int] = []
    plain = AdaptedModel.merged

    def counted(self: AdaptedModel, *given: Any) -> Any:
        merged.append(1)
        return plain(self, *given)

    monkeypatch.setattr(AdaptedModel, "merged", counted)
    host = PackHost(pooling, contents.__getitem__, device="cpu")
    images = [picture(seed, 40, 40) for seed in range(5)]
    rows = host.predict([("connected", image) for image in images])
    assert len(rows) == 5
    assert len(merged) == 3


def test_maps_come_from_the_memory_of_the_pooling_backbone(
    contents: dict[str, bytes], pooling: LoadedBackbone
) -> None:
    host = PackHost(pooling, contents.__getitem__, device="cpu")
    host.packs.get("labels")
    assert list(host._forms) == [False], "no maps before a pack asks for them"
    places = {tensor.data_ptr() for tensor in pooling.model.parameters()}
    own = []
    for name in ("connected", "low"):
        model = host.packs.get(name).form
        assert isinstance(model, AdaptedModel)
        shared = [each for each in model.backbone.parameters() if each.data_ptr() in places]
        own += [each for each in model.parameters() if each.data_ptr() not in places]
        assert len(shared) > 20
    assert sum(each.numel() for each in own) < sum(each.numel() for each in shared) / 10
    counted = sum(host.packs.get(name).size_bytes for name in ("connected", "low"))
    assert counted > sum(each.nbytes for each in own)


def test_packs_that_cannot_be_trusted_are_refused(
    packs: dict[str, Pack],
    contents: dict[str, bytes],
    pooling: LoadedBackbone,
    families: dict[str, Backbone],
    tiny_task: Task,
) -> None:
    wrong = dataclasses.replace(packs["low"], probe_logits=packs["low"].probe_logits + 9)
    other = load_backbone(families["swin"], tiny_task.input, gives_maps=True)
    foreign = moved_pack(other, of_masks(tiny_task), {"norms": {}})
    contents |= {"wrong": pack_to_bytes(wrong), "foreign": pack_to_bytes(foreign)}
    host = PackHost(pooling, contents.__getitem__, device="cpu")
    with pytest.raises(PackBackboneMismatch):
        host.packs.get("foreign")
    assert list(host._forms) == [False]
    with pytest.raises(PackDamaged, match="probe logits differ"):
        host.packs.get("wrong")
    assert host.packs.names() == []


class Largest(TorchDispatchMode):
    """Takes note of the largest tensor that operations make, beside views of one."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.elements, self._given = 0, given.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = isinstance(result, torch.Tensor) and (
            result.untyped_storage().data_ptr() != self._given
        )
        if is_new:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("size", [(32, 32), (77, 190), (500, 3), (1, 4000), (5, 7)])
@pytest.mark.parametrize("classes", [1, 2, 9, 60])
def test_a_mask_is_the_largest_logit_of_each_pixel_and_takes_memory_for_one_class(
    size: tuple[int, int], classes: int
) -> None:
    generator = torch.Generator().manual_seed(classes)
    rough = torch.randn(1, 8, 8, classes, generator=generator).movedim(-1, 1)
    logits = functional.interpolate(rough, (32, 32), mode="bilinear")
    whole = functional.interpolate(logits.contiguous(), size, mode="bilinear", align_corners=False)
    with Largest(logits) as largest:
        mask = class_mask(logits[0], size)
    assert mask.dtype == torch.uint8
    assert torch.equal(mask, whole[0].argmax(dim=0).to(torch.uint8))
    assert largest.elements <= max(size[0] * size[1], 32 * 32)
