"""Late packs: blocks before `from_block` do not change, and are computed once per image."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_points import ARGUMENTS, POINT_BACKBONE, SOLIDS
from pydantic import ValidationError

from pipeline.adaptation import AdaptedModel, RankedIndices, attach, plan
from pipeline.adaptation.depth import blocks_of
from pipeline.adaptation.packing import SizePlanner, describe, from_pack, to_pack
from pipeline.adaptation.trunk import KEPT
from pipeline.backbones import LoadedBackbone, fingerprint, load_backbone
from pipeline.data import prepare
from pipeline.errors import BackboneError
from pipeline.kinds import score
from pipeline.packs import pack_to_bytes, read_pack
from pipeline.specs import Backbone, Input, Recipe, SearchSpace, Selection, Task, Training
from pipeline.training import Inputs, evaluate, open_inputs, rehearsal, train_epochs
from pipeline.training.rehearsal import rehearse

CLASSES = ["a", "b", "c"]
LATE = {"vit": 1, "swin": 1, "convnext": 2, "convnext_linear": 2, "cait": 2, "resnet": 5}
EVERY_PART = (
    {"connections": {"top_k": 2}, "biases": {}, "norms": {"which": "all"}, "smoa": {"width": 4}},
    {"adapter": {"width": 2}, "lora": {"rank": 2}},
    {"ssf": {}},
    {"fact": {"rank": 2}},
    {"dtl": {"rank": 2, "feed_from": 0}},
    {"full": {}},
)
Select = Callable[..., dict[str, RankedIndices]]


@pytest.fixture(scope="module")
def backbones(families: dict[str, Backbone]) -> dict[str, LoadedBackbone]:
    """The tiny families, one whose tokens are joined by others half-way, and a plain CNN."""
    cait = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    specs = {
        **families,
        "cait": Backbone(model="cait_xxs24_224", arguments=cait, weights="random"),
        "resnet": Backbone(model="resnet18", weights="random"),
    }
    return {name: load_backbone(spec, Input(size_px=32)) for name, spec in specs.items()}


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    KEPT.clear()


def images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def late(backbone: LoadedBackbone, first: int, parts: dict[str, object] | None = None) -> Recipe:
    content = {"norms": {"which": "all", "bits": 8}} if parts is None else parts
    return Recipe.model_validate({**content, "from_block": first})


def changed(model: AdaptedModel) -> AdaptedModel:
    """As if trained: every latent value somewhere else."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.values.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.inference_mode()
def test_going_on_from_the_trunk_gives_the_logits_of_a_whole_pass(
    backbones: dict[str, LoadedBackbone],
) -> None:
    for family, first in LATE.items():
        recipe = late(backbones[family], first)
        model = changed(attach(backbones[family], recipe, 3, keeps_trunk=True))
        whole = torch.cat([model(image[None]) for image in images(3)])
        resumed = model.logits_of(model.inputs_of(images(3)))
        with model.merged():
            merged = model.logits_of(model.inputs_of(images(3)))
        for logits in (resumed, merged):
            torch.testing.assert_close(
                logits, whole, rtol=0, atol=1e-5 * float(whole.abs().max()), msg=family
            )


def test_a_trunk_computes_every_image_once_and_alike_in_every_batch(
    backbones: dict[str, LoadedBackbone],
) -> None:
    model = attach(backbones["vit"], late(backbones["vit"], 1), 3, keeps_trunk=True)
    passes: list[int] = []
    early = model.backbone.get_submodule("patch_embed.proj")
    early.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    together = model.inputs_of(images(5))
    assert passes == [1] * 5
    assert torch.equal(model.inputs_of(images(5).flip(0)), together.flip(0))
    assert passes == [1] * 5, "kept"
    KEPT.clear()
    alone = torch.cat([model.inputs_of(image[None]) for image in images(5).flip(0)])
    assert torch.equal(alone, together.flip(0)), "bit for bit"


def test_only_later_blocks_change(
    backbones: dict[str, LoadedBackbone], random_selection: Select
) -> None:
    for family, parts in itertools.product(("vit", "swin", "convnext"), EVERY_PART):
        backbone, first = backbones[family], LATE[family]
        if (family == "convnext" and "fact" in parts) or (family == "convnext" and "lora" in parts):
            continue  # its layers are convolutions
        blocks, selected = blocks_of(backbone), random_selection(backbone, 3)
        of_modules = {name.rpartition(".")[0]: block for name, block in blocks.items()}
        recipe = late(backbone, first, parts)
        tensors = plan(backbone, recipe, 3, selected)
        assert len(tensors) < len(plan(backbone, recipe.changed(from_block=0), 3, selected))
        for tensor in tensors:
            owners = [
                block
                for name, block in {**blocks, **of_modules}.items()
                if name and f"{name}." in f"{tensor.name}."
            ]
            assert min(owners, default=first) >= first, (family, tensor.name)
        model = attach(backbone, recipe, 3, selected=selected)
        assert fingerprint(model.backbone.state_dict()) == fingerprint(
            attach(backbone, recipe, 3, selected=selected, seed=1).backbone.state_dict()
        )


def test_a_late_pack_has_its_planned_size_and_gives_the_model_back(
    tiny_task: Task, backbones: dict[str, LoadedBackbone], random_selection: Select
) -> None:
    backbone = backbones["vit"]
    for level, parts in itertools.product(("neuron", "network"), EVERY_PART[:2]):
        selected = random_selection(backbone, 3, level=level)
        task = tiny_task.model_copy(update={"selection": Selection(level=level)})
        recipe = late(backbone, 1, parts)
        model = changed(attach(backbone, recipe, 3, selected=selected, keeps_trunk=True))
        content = pack_to_bytes(to_pack(model, describe(task, recipe, backbone, CLASSES)))
        planner = SizePlanner(task, backbone, CLASSES, selected)
        assert planner.size_bytes(recipe) == len(content), (level, parts)
        assert planner.size_bytes(recipe.changed(from_block=0)) > len(content)
        reloaded = from_pack(read_pack(content), backbone)
        with torch.inference_mode():
            torch.testing.assert_close(
                reloaded(images(3)), model.logits_of(model.inputs_of(images(3)))
            )


def test_training_from_the_trunk_is_training(tiny_inputs: Inputs) -> None:
    """Against the same steps without a trunk: only rounding differs."""
    recipe = late(tiny_inputs.backbone, 1, {"adapter": {"bits": 32}, "head": {"bits": 32}})
    training = tiny_inputs.task.recipe.training
    losses, scores = [], []
    for keeps_trunk in (False, True):
        model = attach(tiny_inputs.backbone, recipe, 8, keeps_trunk=keeps_trunk)
        arguments = (tiny_inputs.reader("train"), tiny_inputs.splits["train"])
        losses.append(
            list(train_epochs(model, *arguments, training, tiny_inputs.kind, seed=0, flip=False))
        )
        outcomes = evaluate(
            model, tiny_inputs.reader("val"), tiny_inputs.splits["val"], tiny_inputs.kind
        )
        scores.append(score(tiny_inputs.metric, outcomes).value)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < losses[0][0]
    assert scores[1] == pytest.approx(scores[0], abs=0.15)


def test_blocks_that_there_are_not_are_refused(backbones: dict[str, LoadedBackbone]) -> None:
    with pytest.raises(BackboneError, match=r"given 2, but the last block of VisionTrans.* is 1;"):
        plan(backbones["vit"], late(backbones["vit"], 2), 3)
    for part in ("prompts", "class_token"):
        with pytest.raises(ValidationError, match=f"{part} changes what the first block reads"):
            Recipe.model_validate({part: {}, "from_block": 1})
    with pytest.raises(ValidationError, match=r"smoa\.prompt_generator changes"):
        Recipe.model_validate({"smoa": {"prompt_generator": True}, "from_block": 1})


def test_a_network_that_cannot_be_cut_is_refused_before_a_study(
    tiny_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another tensor crossed the cut."""
    recipe = late(tiny_inputs.backbone, 1, {"adapter": {}})
    inputs_of = AdaptedModel.inputs_of
    monkeypatch.setattr(
        AdaptedModel, "inputs_of", lambda model, images: torch.zeros_like(inputs_of(model, images))
    )
    with pytest.raises(BackboneError, match=r"from_block: later blocks read more of the earlier"):
        rehearse(tiny_inputs, recipe)


def test_a_late_recipe_is_rehearsed_in_bfloat16(
    tiny_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.utils.devices.has_bf16_units", lambda device: True)
    monkeypatch.setattr(rehearsal, "_rehearsed", set())
    rehearse(tiny_inputs, late(tiny_inputs.backbone, 1, {"adapter": {"dropout": 0.5}}))


def test_a_point_transformer_cannot_be_cut_because_its_blocks_read_positions(
    tmp_path: Path,
) -> None:
    deep = POINT_BACKBONE.model_copy(update={"arguments": {**ARGUMENTS, "depth": 4}})
    recipe = Recipe.model_validate({"adapter": {}, "from_block": 1})
    task = Task.model_validate({**SOLIDS, "backbone": deep, "recipe": recipe})
    prepare(task, tmp_path)
    inputs = open_inputs(task, tmp_path)
    with pytest.raises(BackboneError, match=r"from_block: later blocks read more of the earlier"):
        rehearse(inputs, recipe)
    rehearse(inputs, recipe.changed(training=Training(augment="light")))


def test_the_first_block_can_be_searched() -> None:
    space = SearchSpace(from_block=(0, 1))
    base = Recipe.model_validate({"adapter": {}})
    assert [space.recipe(base, point).from_block for point in space.points()] == [0, 1]
    assert space.fault(Recipe.model_validate({"prompts": {}})) is not None
