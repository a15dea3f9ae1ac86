"""A registry with packs of one tiny backbone, and a server on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers_mixed import moved_pack, moved_packs, of_masks
from helpers_points import POINT_BACKBONE, SOLIDS
from helpers_server import TOKEN, Shop, listening, register_pack

from pipeline.adaptation import SelectedIndex
from pipeline.backbones import load_backbone
from pipeline.backbones.known import remember
from pipeline.registry.store import open_registry
from pipeline.specs import Backbone, Input, Task

RECIPES: dict[str, dict[str, Any]] = {
    "birds": {"connections": {"top_k": 2, "bits": 1}},
    "flowers": {"smoa": {"experts": 2, "width": 4}, "norms": {}},
    "tools": {"adapter": {"width": 3, "bits": 1}},
}
MASK_RECIPES: dict[str, dict[str, Any]] = {
    "regions": {"connections": {"top_k": 2, "bits": 1}, "norms": {}},
    "surfaces": {"lora": {"rank": 2}, "head": {"fuse": 4}},
}


@pytest.fixture(scope="session")
def shop(
    tiny_backbone: Backbone,
    tiny_task: Task,
    random_selection: Callable[..., SelectedIndex],
    tmp_path_factory: pytest.TempPathFactory,
) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    backbone = load_backbone(tiny_backbone, tiny_task.input)
    remember(backbone.fingerprint, "random")
    packs = moved_packs(backbone, tiny_task, RECIPES, random_selection, top_k=2)
    maps = load_backbone(tiny_backbone, tiny_task.input, gives_maps=True)
    masks = moved_packs(
        maps, of_masks(tiny_task), MASK_RECIPES, random_selection, top_k=2, classes=4
    )
    registry = open_registry(None, folder)
    for name, pack in {**packs, **masks}.items():
        register_pack(registry, folder, name, pack)
    register_pack(registry, folder, "foreign", packs["tools"], fingerprint="f" * 64)
    clouds = moved_pack(load_backbone(POINT_BACKBONE, Input()), Task.model_validate(SOLIDS), {})
    register_pack(registry, folder, "clouds", clouds)
    return Shop(folder, registry, backbone, packs, maps, masks)


@pytest.fixture
def settings(shop: Shop) -> Any:
    from pipeline.server.settings import Settings

    return Settings(shop.workdir, ("birds",), token=TOKEN, poll_seconds=0.2, device="cpu")


@pytest.fixture(scope="module")
def served(shop: Shop) -> Iterator[Any]:
    """The address of a server and its engine, which end with the file's tests."""
    from pipeline.server.app import build_app
    from pipeline.server.engine import Engine
    from pipeline.server.settings import Limits, Settings

    limits = Limits(
        request_bytes=200_000,
        json_values=1000,
        image_pixels=1_000_000,
        request_pixels=2_800_000,
        mask_pixels=2_000_000,
        images=32,
        body_seconds=0.5,
        header_bytes=8192,
    )
    engine = Engine(
        Settings(
            shop.workdir, ("birds",), token=TOKEN, poll_seconds=0.2, device="cpu", limits=limits
        )
    )
    with listening(build_app(engine)) as port:
        yield f"http://127.0.0.1:{port}", engine
