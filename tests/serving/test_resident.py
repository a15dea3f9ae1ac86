"""A resident backbone: what is written is what the attached model computes with, and undoing
restores every bit.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.adaptation import attach
from pipeline.adaptation.packing import describe, to_pack
from pipeline.backbones import load_backbone
from pipeline.errors import PackDamaged, PackError
from pipeline.packs import Pack, pack_to_bytes, read_pack
from pipeline.serving.resident import ResidentBackbone
from pipeline.specs import Backbone, Recipe, Task

CLASSES = ("one", "two", "three")
Select = Callable[..., dict[str, torch.Tensor]]
MakePack = Callable[..., Pack]


@pytest.fixture
def make_pack(families: dict[str, Backbone], tiny_task: Task, random_selection: Select) -> MakePack:
    """A pack as if trained, read from its bytes."""

    def make(family: str, seed: int, **parts: dict[str, int]) -> Pack:
        backbone, recipe = (
            load_backbone(families[family], tiny_task.input),
            Recipe.model_validate(parts),
        )
        model = attach(backbone, recipe, len(CLASSES), selected=random_selection(backbone, 3, seed))
        for parameter in model.values.parameters():
            parameter.data += torch.empty_like(parameter).normal_(
                0, 0.05, generator=torch.Generator().manual_seed(seed)
            )
        return read_pack(
            pack_to_bytes(to_pack(model, describe(tiny_task, recipe, backbone, CLASSES)))
        )

    return make


def resident(
    family: str, families: dict[str, Backbone], task: Task
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A plain model that may be written to, and what its tensors are."""
    loaded = load_backbone(families[family], task.input)
    model = loaded.fresh_model()
    model.load_state_dict(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True
    )
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert [name for name, tensor in expected.items() if not torch.equal(state[name], tensor)] == []


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_a_resident_backbone_computes_what_the_attached_model_does(
    family: str, families: dict[str, Backbone], tiny_task: Task, make_pack: MakePack
) -> None:
    pack = make_pack(family, 1, connections={"bits": 3, "top_k": 2}, biases={"bits": 16})
    model, before = resident(family, families, tiny_task)
    carrier = ResidentBackbone(model)
    carrier.apply(pack)
    changed = [
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    ]
    beside_layers = {"swin": {"relative_position_bias_table"}, "convnext": {"gamma"}}.get(
        family, set()
    )
    assert {name.rpartition(".")[2] for name in changed} == {"weight", "bias"} | beside_layers
    for part in pack.parts:
        for number, spec in enumerate(part.tensors if part.layers else ()):
            weight = before[f"{spec.name}.weight"].flatten().clone()
            weight[torch.from_numpy(part.positions[number])] += torch.from_numpy(
                part.values()[spec.name]
            )
            assert torch.equal(model.get_submodule(spec.name).weight.flatten(), weight)  # type: ignore[operator, union-attr]
    carrier.undo()
    assert_equal(model.state_dict(), before)


def test_a_thousand_switches_are_exact(
    families: dict[str, Backbone], tiny_task: Task, make_pack: MakePack
) -> None:
    packs = [
        make_pack("vit", seed, connections={"bits": bits, "top_k": 1 + seed % 3})
        for seed, bits in enumerate((1, 4, 16, 32))
    ]
    model, before = resident("vit", families, tiny_task)
    carrier = ResidentBackbone(model)
    expected = []
    for pack in packs:
        carrier.apply(pack)
        expected.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        carrier.undo()
    choices = random.Random(0)
    for number in range(1_000):
        chosen = choices.randrange(len(packs))
        carrier.apply(packs[chosen])
        if number % 50 == 49:
            assert_equal(model.state_dict(), expected[chosen])
    carrier.undo()
    assert_equal(model.state_dict(), before)
    carrier.undo()
    assert_equal(model.state_dict(), before)
    assert carrier.kept_bytes == 0


def test_what_is_no_entry_of_the_backbone_is_refused_in_words(
    families: dict[str, Backbone], tiny_task: Task, make_pack: MakePack
) -> None:
    model, before = resident("vit", families, tiny_task)
    with pytest.raises(
        PackError, match=r"has adapters, norms, which are no entries of the backbone; attach it"
    ):
        ResidentBackbone(model).apply(make_pack("vit", 1, connections={}, smoa={}, norms={}))
    pack = make_pack("vit", 1, connections={})
    parts = tuple(
        dataclasses.replace(part, positions=(), recomputed=True) if part.layers else part
        for part in pack.parts
    )
    with pytest.raises(PackError, match="recomputed"):
        ResidentBackbone(model).apply(Pack(pack.metadata, parts, pack.probe_logits))
    assert_equal(model.state_dict(), before)


def test_a_pack_of_another_backbone_writes_nothing(
    families: dict[str, Backbone], tiny_task: Task, make_pack: MakePack
) -> None:
    model, before = resident("vit", families, tiny_task)
    carrier = ResidentBackbone(model)
    carrier.apply(make_pack("vit", 1, connections={}))
    with pytest.raises(PackDamaged, match=r"give the backbone"):
        carrier.apply(make_pack("swin", 1, connections={}))
    assert_equal(model.state_dict(), before)
