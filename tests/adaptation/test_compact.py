"""Packs in memory take few bytes, and give back every bit."""

from __future__ import annotations

import pytest
import torch
from helpers_mixed import FREE, Select, flat, packs_of
from helpers_paths import PROJECT_ROOT

from pipeline.adaptation.compact import compacted, expanded
from pipeline.adaptation.flat import flatten
from pipeline.adaptation.unpacking import decode
from pipeline.backbones import load_backbone
from pipeline.specs import Backbone, Input, Task
from pipeline.specs.yaml_files import load_spec

NOISE = torch.randn(5000, generator=torch.Generator().manual_seed(0))
FEW = NOISE[:300].sign() * 0.1
SOME = NOISE[:700].repeat(7)


def bits(values_N: torch.Tensor) -> list[int]:
    return values_N.view(torch.int32).tolist()


@pytest.mark.parametrize(
    ("values_N", "most_bytes"),
    [
        (FEW, 300 + 8),
        (torch.tensor([0.0, -0.0, 1e-42, -1e-42] * 25), 100 + 16),
        (torch.arange(256).repeat(4).float(), 1024 + 1024),
        (torch.arange(257).repeat(4).float(), 2 * 1028 + 4 * 257),
        (SOME, 2 * 4900 + 4 * 700),
        (NOISE, 4 * 5000),
        (torch.ones(1), 4),
        (torch.zeros(0), 0),
    ],
    ids=["few", "zeros", "256", "257", "some", "noise", "one", "none"],
)
def test_numbers_are_kept_bit_for_bit(values_N: torch.Tensor, most_bytes: int) -> None:
    kept = compacted(values_N)
    assert bits(expanded([kept])) == bits(values_N)
    assert kept.nbytes <= most_bytes


def test_several_follow_each_other_whatever_their_form() -> None:
    for several in ([FEW, FEW[:7] * 3, FEW], [FEW, SOME], [SOME, NOISE, FEW]):
        found = expanded([compacted(each) for each in several])
        assert bits(found) == bits(torch.cat(several))


def test_a_flat_pack_has_the_values_of_its_file(
    families: dict[str, Backbone], tiny_task: Task, random_selection: Select
) -> None:
    backbone = load_backbone(families["vit"], tiny_task.input)
    for pack in packs_of(FREE, backbone, tiny_task, random_selection):
        decoded = decode(pack, backbone)
        kept = flatten(decoded)
        for name, tensors in decoded.parts.items():
            right = torch.cat([decoded.values[tensor].flatten() for tensor in tensors])
            assert bits(expanded([kept.parts[name].values])) == bits(right)


def test_a_hundred_packs_take_less_memory_than_their_backbone(
    tiny_task: Task, random_selection: Select
) -> None:
    """With a value or more for every neuron: a byte for each value, and two for where it is."""
    folder = PROJECT_ROOT / "tasks" / "demo"
    spec = load_spec(Backbone, folder / "backbone.yaml")
    spec = spec.changed(weights=str(folder / spec.weights))
    backbone = load_backbone(spec, Input(size_px=64))
    recipe = {
        "connections": {"top_k": 1, "bits": 1},
        "biases": {"bits": 1},
        "smoa": {"bits": 1},
        "norms": {"bits": 4},
        "head": {"bits": 2},
    }
    [pack] = packs_of([recipe], backbone, tiny_task.changed(backbone=spec), random_selection)
    [kept] = flat([pack], backbone)
    backbone_bytes = sum(each.nbytes for each in backbone.model.parameters())
    assert kept.size_bytes < backbone_bytes / 100
    connections = kept.parts["connections"]
    assert connections.nbytes < 3.1 * len(connections.values)
