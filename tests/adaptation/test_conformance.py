"""What every part promises, on every family of backbones: one suite that each new part has to pass.

It attaches or is refused in words; it starts without effect where it says so; gradients go to its
own values and nowhere else; training leaves the backbone as it was; its pack has the bytes it
announced and gives the same logits; a state dict restores it; a seed repeats it; bfloat16 does not
break it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.adaptation import AdaptedModel, SelectedIndex, attach, plan
from pipeline.adaptation.packing import SizePlanner, describe, from_pack, to_pack
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.errors import BackboneError
from pipeline.packs import ledger, pack_to_bytes, read_pack
from pipeline.specs import Backbone, Input, Recipe, Task

FAMILIES = ("vit", "swin", "convnext", "convnext_linear")
CLASSES = ("one", "two", "three")
SELECTED = 4
Select = Callable[..., SelectedIndex]

# Each part as few words as possible; dropout stays on, so that a seed has something to repeat.
PARTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "head without bias": {"head": {"bits": 1, "bias": False}},
    "connections": {"connections": {"top_k": 2}},
    "biases": {"biases": {}},
    "norms": {"norms": {}},
    "norms all": {"norms": {"which": "all"}},
    "all biases": {"biases": {}, "norms": {"which": "all", "parameters": "bias"}},
    "smoa": {"smoa": {"experts": 3, "width": 4}},
    "smoa after_mlp": {"smoa": {"experts": 3, "width": 4, "placement": "after_mlp"}},
    "smoa of sub-tokens": {"smoa": {"experts": 4, "width": 4, "heads": 2, "top_k": 2}},
    "smoa with prompts": {"smoa": {"experts": 2, "width": 4, "prompt_generator": True}},
    "adapter": {"adapter": {"width": 4}},
    "adapter after_mlp": {"adapter": {"width": 4, "placement": "after_mlp"}},
    "adapter after_attention": {"adapter": {"width": 4, "placement": "after_attention"}},
    "adapter after_both": {"adapter": {"width": 4, "placement": "after_both"}},
    "lora": {"lora": {"rank": 3}},
    "lora everywhere": {"lora": {"rank": 3, "targets": ["qkv", "proj", "fc1", "fc2"]}},
    "lora of the MLP": {"lora": {"rank": 3, "targets": ["fc2", "fc1"]}},
    "fact": {"fact": {"rank": 3}},
    "fact of the MLP": {"fact": {"rank": 3, "targets": ["fc1", "fc2"]}},
    "fact at 1 bit": {"fact": {"rank": 3, "bits": 1, "targets": ["fc1", "fc2"]}},
    "lloyd_max": {
        "adapter": {"width": 4},
        "smoa": {"placement": "after_mlp"},
        "quantiser": {"codebook": "lloyd_max"},
    },
    "a scale a row": {
        "adapter": {"width": 4, "bits": 1},
        "biases": {"bits": 2},
        "head": {"bits": 3},
        "quantiser": {"scales": "row"},
    },
    "lora, both": {
        "lora": {"targets": ["fc1"], "bits": 2},
        "quantiser": {"codebook": "lloyd_max", "scales": "row"},
    },
    "ssf": {"ssf": {}},
    "prompts": {"prompts": {"count": 3}},
    "prompts deep": {"prompts": {"count": 3, "deep": True}},
    "class_token": {"class_token": {}},
    "full": {"full": {}},
    "full at 1 bit": {"full": {"bits": 1}},
    "Adapter-X": {
        "smoa": {
            "experts": 2,
            "width": 4,
            "heads": 2,
            "bits": 1,
            "placement": "after_mlp",
            "prompt_generator": True,
        },
        **{"norms": {}, "class_token": {}, "head": {"bits": 1, "bias": False}},
    },
    "house": {"connections": {}, "biases": {}, "smoa": {}, "norms": {}},
    "all that goes together": {
        **{"connections": {}, "biases": {}, "smoa": {}, "norms": {}},
        **{"adapter": {"placement": "after_mlp"}, "lora": {"targets": ["fc1"]}},
    },
}
TOKENS = dict.fromkeys(
    ("smoa with prompts", "prompts", "prompts deep", "class_token", "Adapter-X"),
    "expected a VisionTransformer",
)
NO_ATTENTION = {
    "adapter after_attention": "no attention branch",
    "adapter after_both": "no attention branch",
    "lora": "it has .*fc1, fc2",
}
REFUSED = {
    ("convnext", "lora everywhere"): "given 'qkv'.*it has .*fc1, fc2",
    ("convnext_linear", "lora everywhere"): "given 'qkv'.*it has .*fc1, fc2",
    ("convnext_linear", "fact"): "given 'qkv'.*it has .*fc1, fc2",
    **{("convnext", part): "it has no Linear layers" for part in PARTS if part.startswith("fact")},
    **{
        (family, part): message
        for family in ("convnext", "convnext_linear")
        for part, message in NO_ATTENTION.items()
    },
    **{
        (family, part): message
        for family in ("swin", "convnext", "convnext_linear")
        for part, message in TOKENS.items()
    },
}
ACCEPTED = [
    (family, part) for family in FAMILIES for part in PARTS if (family, part) not in REFUSED
]
SILENT_AT_START = (
    "connections",
    "biases",
    "norms",
    "adapter",
    "lora",
    "fact",
    "class_token",
    "full",
)
every_pair = pytest.mark.parametrize(("family", "part"), ACCEPTED)


def make_recipe(part: str, bits: int | None = None) -> Recipe:
    """The part's recipe, all its sections at `bits` where given."""
    given = {"bits": bits} if bits is not None else {}
    sections = {
        name: {**section, **({} if name == "quantiser" else given)}
        for name, section in PARTS[part].items()
    }
    return Recipe.model_validate(sections)


def images(count: int = 6) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="module")
def load(families: dict[str, Backbone]) -> Callable[[str], LoadedBackbone]:
    return functools.cache(lambda family: load_backbone(families[family], Input(size_px=32)))


@pytest.fixture(scope="module")
def start(
    load: Callable[[str], LoadedBackbone], random_selection: Select
) -> Callable[..., AdaptedModel]:
    """A function (family, recipe, seed) -> the recipe's model before training."""

    def build(family: str, recipe: Recipe, seed: int = 0) -> AdaptedModel:
        return attach(
            load(family),
            recipe,
            len(CLASSES),
            selected=random_selection(load(family), SELECTED),
            seed=seed,
        )

    return build


def step(model: AdaptedModel, optimiser: torch.optim.Optimizer) -> None:
    logits = model(images())
    optimiser.zero_grad()
    (
        F.cross_entropy(logits.float(), torch.arange(6) % len(CLASSES)) + model.auxiliary_loss()
    ).backward()
    optimiser.step()


def train(model: AdaptedModel, steps: int = 2) -> AdaptedModel:
    optimiser = torch.optim.AdamW(model.values.parameters(), lr=0.02, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        step(model, optimiser)
    return model.eval()


def latent(model: AdaptedModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.values.parameters()]


def logits(model: AdaptedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(images())


@pytest.fixture(scope="module")
def trained(start: Callable[..., AdaptedModel]) -> Callable[[str, str], AdaptedModel]:
    """A function (family, part) -> the part's model after a few steps; the tests share it and only
    look at it.
    """

    @functools.cache
    def build(family: str, part: str) -> AdaptedModel:
        return train(start(family, make_recipe(part)))

    return build


@pytest.mark.parametrize(("family", "part"), REFUSED)
def test_what_does_not_fit_a_family_is_refused_in_words(
    family: str, part: str, load: Callable[[str], LoadedBackbone]
) -> None:
    for call in (plan, attach):
        with pytest.raises(BackboneError, match=REFUSED[family, part]):
            call(load(family), make_recipe(part), len(CLASSES))


@every_pair
def test_what_is_planned_is_what_trains(family: str, part: str, load: Any, trained: Any) -> None:
    model, planned = trained(family, part), plan(load(family), make_recipe(part), len(CLASSES))
    assert model.values.tensors == planned
    assert (
        model.trained_values()
        == sum(tensor.values for tensor in planned)
        == sum(len(values) for values in latent(model))
    )
    assert {id(each) for each in model.parameters() if each.requires_grad} == {
        id(each) for each in model.values.parameters()
    }


@every_pair
def test_it_starts_without_effect_where_it_says_so(
    family: str, part: str, load: Any, start: Any
) -> None:
    if set(PARTS[part]) - set(SILENT_AT_START) or not PARTS[part]:
        return
    for bits in (16, 32):
        model = start(family, make_recipe(part, bits))
        with torch.inference_mode():
            model(images())  # hands the changes to the modules
            x = model.normalise(images())
            torch.testing.assert_close(
                model.backbone(x), load(family).model(x), rtol=1e-5, atol=1e-5
            )


@every_pair
def test_every_value_of_the_part_matters_and_learns(family: str, part: str, start: Any) -> None:
    """No tensor is planned, stored and paid for without being used: its gradient is not zero once
    it is somewhere else than at its start.
    """
    model = start(family, make_recipe(part))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.values.parameters():
        parameter.data += torch.empty_like(parameter).normal_(0, 0.05, generator=generator)
    values = model.values()
    for tensor, value in values.items():
        value.retain_grad()
        module, key = model._receivers[tensor]
        module.current[key] = value
    x = model.normalise(images())
    model.head(model.backbone(x)).square().mean().backward()
    idle = [
        tensor.name
        for tensor, value in values.items()
        if value.grad is None or not float(value.grad.abs().max())
    ]
    assert idle == []


@pytest.fixture(scope="module")
def untouched(load: Callable[[str], LoadedBackbone]) -> dict[str, dict[str, torch.Tensor]]:
    """The backbones' tensors before anything was attached."""
    return {
        family: {name: tensor.clone() for name, tensor in load(family).model.state_dict().items()}
        for family in FAMILIES
    }


@every_pair
def test_training_leaves_the_backbone_alone(
    family: str, part: str, load: Any, untouched: Any, start: Any
) -> None:
    train(start(family, make_recipe(part)))
    state = load(family).model.state_dict()
    assert all(torch.equal(tensor, untouched[family][name]) for name, tensor in state.items())
    assert all(parameter.grad is None for parameter in load(family).model.parameters())


@every_pair
def test_its_pack_has_the_announced_bytes_and_gives_the_same_logits(
    family: str, part: str, load: Any, trained: Any, tiny_task: Task, random_selection: Any
) -> None:
    backbone, recipe, model = load(family), make_recipe(part), trained(family, part)
    pack = to_pack(model, describe(tiny_task, recipe, backbone, CLASSES))
    content = pack_to_bytes(pack)
    planner = SizePlanner(tiny_task, backbone, CLASSES, random_selection(backbone, SELECTED))
    assert planner.size_bytes(recipe) == len(content)
    assert planner.ledger(recipe) == ledger(pack)
    expected = logits(model)
    torch.testing.assert_close(
        logits(from_pack(read_pack(content), backbone)),
        expected,
        rtol=1e-5,
        atol=1e-5 * max(1, float(expected.abs().max())),
    )


@every_pair
def test_merged_for_evaluation_it_computes_the_same(family: str, part: str, trained: Any) -> None:
    model = trained(family, part)
    expected = logits(model)
    with torch.inference_mode(), model.merged():
        merged = model(images())
    torch.testing.assert_close(
        merged, expected, rtol=1e-4, atol=1e-5 * max(1, float(expected.abs().max()))
    )
    assert torch.equal(logits(model), expected), "and can go on as before"


@every_pair
def test_its_state_survives_a_checkpoint(family: str, part: str, start: Any, trained: Any) -> None:
    model, again = trained(family, part), start(family, make_recipe(part), seed=5)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))


@every_pair
def test_a_seed_repeats_it(family: str, part: str, start: Any, trained: Any) -> None:
    torch.manual_seed(1234)  # whatever the process has drawn before
    again = train(start(family, make_recipe(part)))
    assert all(
        torch.equal(a, b) for a, b in zip(latent(again), latent(trained(family, part)), strict=True)
    )
    other = train(start(family, make_recipe(part), seed=1))
    assert not all(torch.equal(a, b) for a, b in zip(latent(again), latent(other), strict=True))


@every_pair
def test_it_trains_in_bfloat16_with_float32_values(family: str, part: str, start: Any) -> None:
    model = start(family, make_recipe(part))
    model.compute_in(torch.bfloat16)
    model.train()
    before = latent(model)
    optimiser = torch.optim.AdamW(model.values.parameters(), lr=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images())
    (
        F.cross_entropy(output.float(), torch.arange(6) % len(CLASSES)) + model.auxiliary_loss()
    ).backward()
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.float32
        for parameter in model.values.parameters()
    )
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.values.parameters())
    optimiser.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, latent(model), strict=True))
