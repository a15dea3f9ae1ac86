"""From a trained model to a file and back: the planned size is the file's, the reloaded model is
the trained one, anything else is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers_cases import for_every

from pipeline.adaptation import AdaptedModel, RankedIndices, attach, packing
from pipeline.adaptation.packing import SizePlanner, describe, from_pack, probe_logits, to_pack
from pipeline.adaptation.sites import weight_shapes
from pipeline.backbones import LoadedBackbone, load, load_backbone
from pipeline.backbones.fingerprint import fingerprint_and_trail
from pipeline.errors import PackBackboneMismatch, PackDamaged
from pipeline.packs import Pack, encode_positions, ledger, pack_to_bytes, read_pack
from pipeline.specs import Backbone, Biases, Input, Recipe, Task

CLASSES = ("one", "two", "three")
FAMILIES = ("vit", "swin", "convnext", "convnext_linear")
MIXES = {
    "all": ("connections", "biases", "norms", "smoa", "head"),
    "connections": ("connections", "head"),
    "bank and norms": ("smoa", "norms"),
    "biases": ("biases",),
    "head": ("head",),
}
Select = Callable[..., dict[str, RankedIndices]]


def make_recipe(mix: str, bits: int) -> Recipe:
    return Recipe.model_validate({part: {"bits": bits} for part in MIXES[mix]})


def trained(backbone: LoadedBackbone, recipe: Recipe, select: Select) -> AdaptedModel:
    """As if trained: every latent value somewhere else."""
    model = attach(backbone, recipe, len(CLASSES), selected=select(backbone, 4))
    generator = torch.Generator().manual_seed(7)
    for parameter in model.values.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: AdaptedModel) -> torch.Tensor:
    images = torch.randint(
        0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        return model.eval()(images)


@for_every("family", FAMILIES)
@for_every("mix", MIXES)
@for_every("bits", [1, 3, 4, 8, 16, 32])
def test_a_pack_has_its_planned_size_and_gives_the_trained_model_back(
    family: str,
    mix: str,
    bits: int,
    families: dict[str, Backbone],
    tiny_task: Task,
    random_selection: Select,
) -> None:
    backbone, recipe = load_backbone(families[family], tiny_task.input), make_recipe(mix, bits)
    model = trained(backbone, recipe, random_selection)
    pack = to_pack(model, describe(tiny_task, recipe, backbone, CLASSES))
    content = pack_to_bytes(pack)
    planner = SizePlanner(tiny_task, backbone, CLASSES, random_selection(backbone, 4))
    assert planner.size_bytes(recipe) == len(content)
    assert planner.ledger(recipe) == ledger(pack)
    assert SizePlanner(tiny_task, backbone, CLASSES).size_bytes(recipe) <= len(content)
    reloaded = from_pack(read_pack(content), backbone)
    expected = logits(model)
    torch.testing.assert_close(
        logits(reloaded), expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max()))
    )
    assert Recipe.model_validate(pack.metadata.recipe) == recipe


def test_places_are_coded_once_for_all_widths_of_their_values(
    tiny_task: Task,
    tiny_backbone: Backbone,
    random_selection: Select,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coded: list[int] = []

    def counted(layers: Any, shapes: Any) -> bytes:
        coded.append(len(layers))
        return encode_positions(layers, shapes)

    monkeypatch.setattr("pipeline.packs.parts.encode_positions", counted)
    packing._KEPT_POSITIONS.clear()
    backbone = load_backbone(tiny_backbone, tiny_task.input)
    selected = random_selection(backbone, 4)
    planner = SizePlanner(tiny_task, backbone, CLASSES, selected)
    recipes = [
        Recipe.model_validate({"connections": {"top_k": top_k, "bits": bits}})
        for top_k in (1, 3)
        for bits in (1, 4, 16)
    ]
    sizes = [planner.size_bytes(recipe) for recipe in recipes]
    assert len(coded) == 2
    assert sizes == [
        SizePlanner(tiny_task, backbone, CLASSES, selected).size_bytes(recipe) for recipe in recipes
    ]


def test_packing_a_reloaded_model_again_gives_the_same_logits(
    tiny_task: Task, tiny_backbone: Backbone, random_selection: Select
) -> None:
    """What is read from a file is used as it is: it is not quantised a second time."""
    backbone, recipe = load_backbone(tiny_backbone, tiny_task.input), make_recipe("all", 2)
    model = trained(backbone, recipe, random_selection)
    reloaded = from_pack(
        read_pack(pack_to_bytes(to_pack(model, describe(tiny_task, recipe, backbone, CLASSES)))),
        backbone,
    )
    used, read = model.values(), reloaded.values()
    assert read.keys() == used.keys()
    for tensor, value in read.items():
        torch.testing.assert_close(value, used[tensor], rtol=1e-6, atol=1e-7)


def test_probe_logits_do_not_depend_on_the_model_being_in_training(
    tiny_task: Task, tiny_backbone: Backbone, random_selection: Select
) -> None:
    model = trained(
        load_backbone(tiny_backbone, tiny_task.input), make_recipe("all", 8), random_selection
    )
    assert (probe_logits(model.train()) == probe_logits(model.eval())).all()


# --- what does not belong together ----------------------------------------------------------------


@pytest.fixture
def pack(tiny_task: Task, tiny_backbone: Backbone, random_selection: Select) -> Pack:
    """A pack of the tiny backbone with every part, read from its bytes."""
    backbone, recipe = load_backbone(tiny_backbone, tiny_task.input), make_recipe("all", 4)
    return read_pack(
        pack_to_bytes(
            to_pack(
                trained(backbone, recipe, random_selection),
                describe(tiny_task, recipe, backbone, CLASSES),
            )
        )
    )


@pytest.fixture
def other_weights(
    tiny_task: Task, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LoadedBackbone]:
    """The tiny backbone with other random weights."""
    load._load_cached.cache_clear()
    monkeypatch.setattr(load, "RANDOM_WEIGHTS_SEED", 1)
    yield load_backbone(tiny_backbone, tiny_task.input)
    load._load_cached.cache_clear()


def test_other_weights_are_refused(pack: Pack, other_weights: LoadedBackbone) -> None:
    expected = (
        r"task 'tiny' needs the backbone vit_tiny_patch16_224"
        rf" .*{pack.metadata.backbone['fingerprint'][:16]}.*{other_weights.fingerprint[:16]}"
    )
    with pytest.raises(PackBackboneMismatch, match=expected):
        from_pack(pack, other_weights)
    with pytest.raises(PackBackboneMismatch, match=r"first tensor that differs is blocks\.0\."):
        from_pack(pack, other_weights)


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.weight", "cls_token", "pos_embed"])
def test_the_first_tensor_that_differs_is_named(name: str, pack: Pack, tiny_inputs: Any) -> None:
    state = {key: tensor.clone() for key, tensor in tiny_inputs.backbone.model.state_dict().items()}
    state[name].flatten()[0] += 1
    fingerprint, trail = fingerprint_and_trail(state)
    changed = dataclasses.replace(tiny_inputs.backbone, fingerprint=fingerprint, trail=trail)
    with pytest.raises(PackBackboneMismatch, match=f"first tensor that differs is {name};"):
        from_pack(pack, changed)


def test_another_width_is_refused(pack: Pack, tiny_task: Task, tiny_backbone: Backbone) -> None:
    narrow = tiny_backbone.model_copy(
        update={"arguments": {**tiny_backbone.arguments, "embed_dim": 32}}
    )
    with pytest.raises(PackBackboneMismatch):
        from_pack(pack, load_backbone(narrow, tiny_task.input))


def test_a_backbone_set_to_another_size_is_refused_in_words(
    pack: Pack, tiny_backbone: Backbone
) -> None:
    with pytest.raises((PackBackboneMismatch, PackDamaged), match="32"):
        from_pack(pack, load_backbone(tiny_backbone, Input(size_px=64)))


def with_recipe(pack: Pack, **changes: Any) -> Pack:
    """The pack with another recipe in its metadata, written and read again: its digest is in
    order.
    """
    metadata = pack.metadata.model_copy(update={"recipe": {**pack.metadata.recipe, **changes}})
    return read_pack(pack_to_bytes(Pack(metadata, pack.parts, pack.probe_logits)))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("connections", {"top_k": 2}, "ill-shaped connections"),
        ("connections", {"bits": 8}, "ill-shaped connections"),
        ("smoa", {"experts": 3}, "ill-shaped adapters"),
        ("smoa", {"experts": 1}, "surplus adapters"),
        ("head", {"bits": 1}, "ill-shaped head 'head.weight'"),
        ("head", {"rank": 8}, "ill-shaped head 'head.weight'"),
        ("head", {"rank": 0}, "recipe"),
        ("smoa", {"scale": 500.0}, "probe logits"),
        ("smoa", {"scale": -1.0}, "recipe"),
        ("smoa", {"scle": 1.0}, "recipe"),
        ("head", {"bits": 9}, "recipe"),
    ],
)
def test_a_recipe_that_was_changed_is_refused(
    part: str, change: dict[str, Any], message: str, pack: Pack, tiny_inputs: Any
) -> None:
    section = pack.metadata.recipe[part]
    assert isinstance(section, dict)
    with pytest.raises(PackDamaged, match=message):
        from_pack(with_recipe(pack, **{part: {**section, **change}}), tiny_inputs.backbone)


def test_an_unknown_part_in_the_recipe_is_refused(pack: Pack, tiny_inputs: Any) -> None:
    with pytest.raises(PackDamaged, match="recipe"):
        from_pack(with_recipe(pack, prompts={"count": 3}), tiny_inputs.backbone)


def test_a_part_that_is_missing_or_surplus_is_refused(pack: Pack, tiny_inputs: Any) -> None:
    without = dataclasses.replace(
        pack, parts=tuple(part for part in pack.parts if part.name != "norms")
    )
    with pytest.raises(PackDamaged, match=r"missing norms 'blocks\.0\.norm2\.bias'"):
        from_pack(without, tiny_inputs.backbone)
    linear_probe = pack.metadata.model_copy(
        update={"recipe": make_recipe("head", 4).model_dump(exclude_none=True)}
    )
    with pytest.raises(PackDamaged, match="surplus"):
        from_pack(dataclasses.replace(pack, metadata=linear_probe), tiny_inputs.backbone)


@pytest.mark.parametrize("family", ["swin", "convnext"])
def test_a_pack_without_other_biases_leaves_them_frozen(
    family: str, families: dict[str, Backbone], tiny_task: Task, random_selection: Select
) -> None:
    """Earlier versions trained none of them; their packs give what they gave."""
    backbone, recipe = (
        load_backbone(families[family], tiny_task.input),
        Recipe(biases=Biases(bits=32)),
    )
    model = trained(backbone, recipe, random_selection)
    layers = weight_shapes(backbone.model)
    with torch.no_grad():
        for tensor, values in model.values().items():
            if tensor.part == "biases" and tensor.name not in layers:
                values.zero_()  # at 32 bits a view of the latent values
    pack = to_pack(model, describe(tiny_task, recipe, backbone, CLASSES))
    (part,) = (part for part in pack.parts if part.name == "biases")
    count = sum(math.prod(spec.shape) for spec in part.tensors if spec.name in layers)
    kept = tuple(spec for spec in part.tensors if spec.name in layers)
    assert len(kept) < len(part.tensors)
    earlier = dataclasses.replace(part, tensors=kept, codes=part.codes[:count])
    parts = tuple(earlier if each is part else each for each in pack.parts)
    content = pack_to_bytes(dataclasses.replace(pack, parts=parts))
    assert torch.equal(logits(from_pack(read_pack(content), backbone)), logits(model))


def test_values_that_were_changed_do_not_pass_the_probe(pack: Pack, tiny_inputs: Any) -> None:
    changed = tuple(
        (
            dataclasses.replace(part, codes=part.codes[::-1].copy())
            if part.name == "head" and part.bits == 4
            else part
        )
        for part in pack.parts
    )
    with pytest.raises(PackDamaged, match="probe logits"):
        from_pack(dataclasses.replace(pack, parts=changed), tiny_inputs.backbone)


def test_values_that_overflow_do_not_pass_the_probe(
    tiny_task: Task, tiny_backbone: Backbone
) -> None:
    """Logits that are not numbers differ from every stored one, though no comparison says so."""
    backbone, recipe = load_backbone(tiny_backbone, tiny_task.input), make_recipe("head", 32)
    pack = to_pack(
        attach(backbone, recipe, len(CLASSES)), describe(tiny_task, recipe, backbone, CLASSES)
    )
    huge = tuple(
        dataclasses.replace(part, codes=np.full_like(part.codes, 3e38)) if part.bits == 32 else part
        for part in pack.parts
    )
    with np.errstate(all="ignore"), pytest.raises(PackDamaged, match="probe logits"):
        from_pack(dataclasses.replace(pack, parts=huge), backbone)
