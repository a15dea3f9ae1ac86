"""Samples of many packs in one pass: each gets the logits that its pack gives alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers_backbones import SWIN_V2
from helpers_mixed import FREE, OTHERS, TOKENS, Select, flat, images_of, moved_pack, packs_of
from helpers_points import ARGUMENTS, POINT_BACKBONE, SOLIDS
from torch import nn

from pipeline.adaptation import mixed_layer
from pipeline.adaptation.mixed import MixedNetwork, keeps_samples_together
from pipeline.adaptation.packing import from_pack
from pipeline.adaptation.part import PARTS, Part, SharedNetwork
from pipeline.adaptation.sites import tunable_layers
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.packs import Pack
from pipeline.specs import Backbone, Input, Recipe, Selection, Task


def assert_as_alone(
    network: MixedNetwork, packs: Sequence[Pack], backbone: LoadedBackbone, owners: Sequence[int]
) -> None:
    """The mixed logits of images are those that each one's pack gives alone."""
    images = images_of(backbone, len(owners))
    found = network.logits(images, flat(packs, backbone), owners)
    for number, pack in enumerate(packs):
        mine = [sample for sample, owner in enumerate(owners) if owner == number]
        with torch.inference_mode():
            expected = from_pack(pack, backbone)(images[mine])
        largest = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(
            torch.stack([found[sample] for sample in mine]),
            expected,
            rtol=1e-5,
            atol=1e-5 * largest,
            msg=lambda details, pack=pack: f"{pack.metadata.recipe}\n{details}",
        )


def shuffled(packs: int, samples: int) -> list[int]:
    """An owner for each of `samples`, at least one a pack, in random order."""
    generator = torch.Generator().manual_seed(1)
    owners = [
        *range(packs),
        *torch.randint(packs, (samples - packs,), generator=generator).tolist(),
    ]
    return [owners[at] for at in torch.randperm(samples, generator=generator).tolist()]


def test_packs_of_every_part_pass_a_vit_once(
    families: dict[str, Backbone], tiny_task: Task, random_selection: Select
) -> None:
    backbone = load_backbone(families["vit"], tiny_task.input)
    network, passes = MixedNetwork(backbone), []
    packs = packs_of(FREE, backbone, tiny_task, random_selection)
    before = {name: each.clone() for name, each in network._network.model.state_dict().items()}
    network._network.model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert_as_alone(network, packs, backbone, shuffled(len(packs), 2 * len(packs)))
    assert len(passes) == 1
    after = network._network.model.state_dict()
    assert [name for name, each in before.items() if not torch.equal(after[name], each)] == []


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_connections_are_added_to_rows_or_written_into_the_weight(
    family: str,
    families: dict[str, Backbone],
    tiny_task: Task,
    random_selection: Select,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ways give what each pack gives alone, beside packs without connections and packs that
    have another number of them in each neuron.
    """
    backbone = load_backbone(families[family], tiny_task.input)
    network, products = MixedNetwork(backbone), []
    recipes = [FREE[4], {"connections": {"top_k": 3, "bits": 16}}, {"adapter": {"width": 4}}]
    packs = packs_of([*recipes, FREE[4]], backbone, tiny_task, random_selection)
    task = tiny_task.model_copy(update={"selection": Selection(level="network")})
    anywhere = random_selection(backbone, 2, 9, "network")
    uneven = moved_pack(backbone, task, FREE[4], selected=anywhere)
    monkeypatch.setattr(mixed_layer, "ROWS_AT_ONCE", 2)
    plain = mixed_layer.MixedLayer._product_per_pack

    def counted(layer: mixed_layer.MixedLayer, *given: Any) -> torch.Tensor:
        products.append(layer.name)
        return plain(layer, *given)

    monkeypatch.setattr(mixed_layer.MixedLayer, "_product_per_pack", counted)
    layers = tunable_layers(backbone.model).items()
    separate = {
        name
        for name, layer in layers
        if isinstance(layer, nn.Linear) or (layer.kernel_size == layer.stride)
    }
    for rows, mixed, is_written in (
        (0, packs, True),
        (1_000_000, packs, False),
        (1_000_000, [*packs, uneven], True),
    ):
        monkeypatch.setattr(mixed_layer, "ROWS_PER_PRODUCT", rows)
        products.clear()
        assert_as_alone(network, mixed, backbone, shuffled(len(mixed), 9))
        assert {*products} == {name for name, _ in layers if is_written or name not in separate}


def test_packs_of_one_recipe_pass_together(
    families: dict[str, Backbone], tiny_task: Task, random_selection: Select
) -> None:
    backbone = load_backbone(families["vit"], tiny_task.input)
    network = MixedNetwork(backbone)
    for recipe in (FREE[5], FREE[8], TOKENS[3], TOKENS[5]):
        packs = packs_of([recipe] * 4, backbone, tiny_task, random_selection)
        assert_as_alone(network, packs, backbone, shuffled(4, 9))


def test_packs_with_the_same_tokens_pass_together(
    families: dict[str, Backbone], tiny_task: Task, random_selection: Select
) -> None:
    backbone = load_backbone(families["vit"], tiny_task.input)
    network, passes = MixedNetwork(backbone), []
    packs = packs_of([*TOKENS, FREE[4], FREE[8]], backbone, tiny_task, random_selection)
    network._network.model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert_as_alone(network, packs, backbone, shuffled(len(packs), 2 * len(packs)))
    # none; two prompts; three of each block; two banks with generators of another shape
    assert len(passes) == 5


@pytest.mark.parametrize("family", ["swin", "convnext", "convnext_linear"])
def test_packs_pass_other_families_together(
    family: str, families: dict[str, Backbone], tiny_task: Task, random_selection: Select
) -> None:
    backbone = load_backbone(families[family], tiny_task.input)
    network = MixedNetwork(backbone)
    packs = packs_of(OTHERS, backbone, tiny_task, random_selection)
    assert all(network.can_mix(Recipe.model_validate(recipe)) for recipe in OTHERS)
    assert not network.can_mix(Recipe.model_validate({"biases": {}}))
    assert_as_alone(network, packs, backbone, shuffled(len(packs), 2 * len(packs)))


def test_parts_that_cannot_mix_say_so(families: dict[str, Backbone], tiny_task: Task) -> None:
    network = MixedNetwork(load_backbone(families["vit"], tiny_task.input))
    assert not network.can_mix(Recipe.model_validate({"full": {}}))
    swin_v2 = MixedNetwork(load_backbone(SWIN_V2, tiny_task.input))
    assert not swin_v2.can_mix(Recipe.model_validate({"adapter": {}}))
    assert swin_v2.can_mix(Recipe())


def test_a_part_without_mix_is_run_apart(
    families: dict[str, Backbone], tiny_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Foreign(type(PARTS["lora"])):  # type: ignore[misc]
        def mix(self, network: SharedNetwork) -> Any:
            return Part.mix(self, network)

    monkeypatch.setitem(PARTS, "lora", Foreign())
    network = MixedNetwork(load_backbone(families["vit"], tiny_task.input))
    assert not network.can_mix(Recipe.model_validate({"lora": {}}))
    assert network.can_mix(Recipe.model_validate({"adapter": {}}))


def test_samples_are_found_apart_in_a_network_that_shuffles_them(
    families: dict[str, Backbone], tiny_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert keeps_samples_together(load_backbone(families["swin"], tiny_task.input))
    backbone = load_backbone(families["vit"], tiny_task.input)
    plain = type(backbone.model.blocks[1]).forward  # type: ignore[index, union-attr]

    def swapped(self: torch.nn.Module, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return plain(self, x.transpose(0, 1).contiguous(), *rest).transpose(0, 1)

    monkeypatch.setattr(type(backbone.model.blocks[1]), "forward", swapped)  # type: ignore[index, union-attr]
    assert not keeps_samples_together.__wrapped__(backbone)  # type: ignore[attr-defined]


def test_a_failed_pass_leaves_the_weights_as_they_were(
    families: dict[str, Backbone], tiny_task: Task, random_selection: Select
) -> None:
    backbone = load_backbone(families["vit"], tiny_task.input)
    network = MixedNetwork(backbone)
    packs = packs_of([FREE[4]] * 2, backbone, tiny_task, random_selection)
    images = images_of(backbone, 2)
    before = network.logits(images, flat(packs, backbone), [0, 1])
    with pytest.raises((RuntimeError, AssertionError)):
        network.logits(images[:, :, :16], flat(packs, backbone), [0, 1])
    after = network.logits(images, flat(packs, backbone), [0, 1])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_late_packs_of_one_image_share_the_blocks_before(
    tiny_backbone: Backbone, tiny_task: Task, random_selection: Select
) -> None:
    backbone = load_backbone(tiny_backbone, tiny_task.input)
    late = [recipe for recipe in FREE if recipe.get("from_block")]
    packs = packs_of([*late, {"norms": {}}, {}], backbone, tiny_task, random_selection)
    images, network = images_of(backbone, 3), MixedNetwork(backbone)
    rows: list[int] = []
    model = network._network.model
    model.get_submodule("blocks.0.attn.qkv").register_forward_hook(
        lambda module, inputs, output: rows.append(len(output))
    )
    owners = [owner for owner in range(len(packs)) for _ in images]
    sources = list(range(len(images))) * len(packs)
    for number in range(3):
        rows.clear()
        found = network.logits(images, flat(packs, backbone), owners, sources)
        if number == 0:  # the trunk is tried, too
            continue
        assert sorted(rows) == [3, 2 * len(images)], "three images for all late packs, others each"
        for owner, pack in enumerate(packs):
            with torch.inference_mode():
                expected = from_pack(pack, backbone)(images)
            mine = [at for at, each in enumerate(owners) if each == owner]
            torch.testing.assert_close(
                torch.stack([found[at] for at in mine]), expected, rtol=1e-5, atol=1e-4
            )


def test_late_packs_of_clouds_pass_whole_because_later_blocks_read_the_positions(
    tiny_task: Task, random_selection: Select
) -> None:
    deep = POINT_BACKBONE.model_copy(update={"arguments": {**ARGUMENTS, "depth": 4}})
    backbone = load_backbone(deep, Input())
    task = Task.model_validate({**SOLIDS, "backbone": deep})
    recipes = [{"adapter": {}, "from_block": 1}, {"lora": {}, "from_block": 1}]
    packs = [moved_pack(backbone, task, recipe) for recipe in recipes]
    clouds, network = backbone.takes.noise(2).half(), MixedNetwork(backbone)
    found = network.logits(clouds, flat(packs, backbone), [0, 0, 1, 1], [0, 1, 0, 1])
    for owner, pack in enumerate(packs):
        with torch.inference_mode():
            expected = from_pack(pack, backbone)(clouds)
        mine = torch.stack(found[2 * owner : 2 * owner + 2])
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
