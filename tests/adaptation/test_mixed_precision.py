"""Mixed batches in bfloat16: each sample gets the class that its pack gives it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_mixed import FREE, OTHERS, TOKENS, Select, flat, images_of, packs_of

from pipeline.adaptation import mixed_layer
from pipeline.adaptation.mixed import MixedNetwork
from pipeline.adaptation.packing import from_pack
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.packs import Pack
from pipeline.specs import Backbone, Task

IMAGES = 6
BITS: list[dict[str, Any]] = [
    {part: {"bits": bits}, "head": {"bits": bits}}
    for part in ("connections", "adapter", "smoa")
    for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
]


def alone(pack: Pack, backbone: LoadedBackbone, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A pack's own logits in float32 and in bfloat16."""
    model = from_pack(pack, backbone)
    with torch.inference_mode():
        exact = model(images)
        with model.merged(torch.bfloat16):
            return exact, model(images)


def is_clear(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The samples whose largest logit is ahead of the next by several times what bfloat16 changes:
    their class does not depend on the order of sums.
    """
    best, second = rounded.topk(2, dim=1).values.unbind(1)
    change = (exact - rounded).abs().amax(dim=1)
    return best - second > torch.maximum(4 * change, 0.02 * rounded.abs().amax(dim=1))


@pytest.mark.parametrize(
    ("family", "recipes", "rows_per_product"),
    [
        ("vit", [*FREE, *TOKENS], 0),
        ("vit", [*FREE, *TOKENS], 1_000_000),
        ("vit", BITS, mixed_layer.ROWS_PER_PRODUCT),
        ("swin", OTHERS, 0),
        ("convnext", OTHERS, 1_000_000),
    ],
    ids=["written", "added", "bits", "swin", "convnext"],
)
def test_classes_in_bfloat16_are_those_of_each_pack_alone(
    family: str,
    recipes: list[dict[str, Any]],
    rows_per_product: int,
    families: dict[str, Backbone],
    tiny_task: Task,
    random_selection: Select,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mixed_layer, "ROWS_PER_PRODUCT", rows_per_product)
    backbone = load_backbone(families[family], tiny_task.input)
    network, images = MixedNetwork(backbone), images_of(backbone, IMAGES)
    packs = packs_of(recipes, backbone, tiny_task, random_selection)
    owners = [number for number in range(len(packs)) for _ in images]
    mixed = images.repeat(len(packs), 1, 1, 1)
    before = {name: each.clone() for name, each in network._network.model.state_dict().items()}
    found = network.logits(mixed, flat(packs, backbone), owners, dtype=torch.bfloat16)
    after = network._network.model.state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items())
    classes = set()
    for number, pack in enumerate(packs):
        exact, rounded = alone(pack, backbone, images)
        clear = is_clear(exact, rounded)
        assert clear.any(), f"{pack.metadata.recipe}: every image is a toss-up"
        mine = torch.stack(found[number * IMAGES : (number + 1) * IMAGES])
        assert mine.dtype == torch.float32
        assert not torch.equal(rounded, exact), "bfloat16 is not used alone"
        assert not torch.equal(mine, exact), "bfloat16 is not used in the mixed batch"
        labels = mine[clear].argmax(dim=1).tolist()
        assert labels == rounded[clear].argmax(dim=1).tolist(), pack.metadata.recipe
        classes |= {*labels}
    assert len(classes) > 1
