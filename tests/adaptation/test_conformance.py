"""Every part passes `check_part` on every family of backbones or is refused there, and `check_part`
notices parts that break a promise.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.adaptation import PlannedTensor, SelectedIndex
from pipeline.adaptation.part import PARTS as REGISTERED
from pipeline.adaptation.part import Assembly, Part, Site
from pipeline.adaptation.parts.biases import BiasesPart
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.specs import Backbone, Input, Recipe
from pipeline.testing import check_part, check_refused

FAMILIES = ("vit", "swin", "convnext", "convnext_linear")
WIDTHS_BITS = {"vit": (1, 3, 16, 32), "swin": (1,), "convnext": (1, 32), "convnext_linear": ()}
"""How values are stored depends on their part, not on the backbone: all widths on one of them."""
SELECTED = 4
Select = Callable[..., SelectedIndex]
Load = Callable[[str], LoadedBackbone]

# Each part as few words as possible; dropout stays on, so that a seed has something to repeat.
PARTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "head without bias": {"head": {"bits": 1, "bias": False}},
    "head on a subspace": {"head": {"bits": 2, "rank": 8}},
    "lora and a head on a subspace": {"lora": {"rank": 3, "targets": ["fc1"]}, "head": {"rank": 5}},
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
    "dtl": {"dtl": {"rank": 3}},
    "dtl of all blocks at 1 bit": {"dtl": {"rank": 2, "bits": 1, "feed_from": 0, "beta": 2.0}},
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
    "dtl beside prompts": {"dtl": {}, "prompts": {"count": 3, "deep": True}},
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
        **{"adapter": {"placement": "after_mlp"}, "lora": {"targets": ["fc1"]}, "dtl": {}},
    },
}
TOKENS = dict.fromkeys(
    (
        *("smoa with prompts", "prompts", "prompts deep", "class_token", "Adapter-X"),
        "dtl beside prompts",
    ),
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
    "dtl",
    "class_token",
    "full",
)


@pytest.fixture(scope="module")
def load(families: dict[str, Backbone]) -> Load:
    return lambda family: load_backbone(families[family], Input(size_px=32))


@pytest.mark.parametrize(("family", "part"), ACCEPTED)
def test_a_part_keeps_its_promises(
    family: str, part: str, load: Load, random_selection: Select
) -> None:
    backbone = load(family)
    check_part(
        Recipe.model_validate(PARTS[part]),
        backbone,
        selected=random_selection(backbone, SELECTED),
        starts_silent=set(PARTS[part]) <= set(SILENT_AT_START),
        widths_bits=WIDTHS_BITS[family],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_that_does_not_fit_is_refused_in_one_line(family: str, load: Load) -> None:
    for part in [part for of, part in REFUSED if of == family]:
        message = check_refused(Recipe.model_validate(PARTS[part]), load(family))
        assert re.search(REFUSED[family, part], message), (part, message)


# --- parts that break a promise -------------------------------------------------------------------


class Hoarder(BiasesPart):
    """Plans a tensor that nothing uses."""

    def plan(self, spec: Any, site: Site) -> list[PlannedTensor]:
        planned = super().plan(spec, site)
        return [*planned, PlannedTensor("biases", f"{planned[-1].name}.more", (4,), spec.bits)]

    def address(self, tensor: PlannedTensor, modules: Mapping[str, Any]) -> tuple[str, str]:
        if tensor.name.endswith(".more"):
            return super().address(self._owner(tensor), modules)[0], "more"
        return super().address(tensor, modules)

    def _owner(self, tensor: PlannedTensor) -> PlannedTensor:
        name = tensor.name.removesuffix(".more")
        return PlannedTensor("biases", name, tensor.shape, tensor.bits)


class Loud(BiasesPart):
    """Changes the features before anything is trained."""

    def attach(self, spec: Any, assembly: Assembly) -> None:
        super().attach(spec, assembly)
        assembly.model.register_forward_hook(lambda module, inputs, output: output + 1)


class Vandal(BiasesPart):
    """Writes into the frozen backbone."""

    def attach(self, spec: Any, assembly: Assembly) -> None:
        super().attach(spec, assembly)
        with torch.no_grad():
            next(assembly.site.model.parameters()).zero_()


class Gambler(BiasesPart):
    """Draws random numbers in training that no seed fixes."""

    def attach(self, spec: Any, assembly: Assembly) -> None:
        super().attach(spec, assembly)
        assembly.model.register_forward_hook(
            lambda module, inputs, output: (
                output * (1 + torch.rand(())) if torch.is_grad_enabled() else output
            )
        )


class Trainer(BiasesPart):
    """Trains a parameter of the network next to its own values."""

    def attach(self, spec: Any, assembly: Assembly) -> None:
        super().attach(spec, assembly)
        next(assembly.model.parameters()).requires_grad_()


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (Hoarder, "stored and never used"),
        (Loud, "it changes an untrained model"),
        (Vandal, "changed the backbone's"),
        (Gambler, "the same seed trains another model"),
        (Trainer, "not among the trained values"),
    ],
)
def test_a_part_that_breaks_a_promise_fails_the_check(
    broken: type[Part], fault: str, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTERED, "biases", broken())
    cached = load_backbone(tiny_backbone, Input(size_px=32))
    backbone = replace(cached, model=copy.deepcopy(cached.model))
    with pytest.raises(AssertionError, match=fault):
        check_part(Recipe.model_validate({"biases": {}}), backbone, starts_silent=True)


def test_a_recipe_that_fits_fails_the_check_of_refusals(tiny_backbone: Backbone) -> None:
    backbone = load_backbone(tiny_backbone, Input(size_px=32))
    with pytest.raises(AssertionError, match="accepts a recipe that does not fit"):
        check_refused(Recipe.model_validate({"biases": {}}), backbone)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        (
            "vit",
            {
                "connections": {"top_k": 2},
                "biases": {},
                "prompts": {"count": 2, "deep": True},
                "class_token": {},
            },
        ),
        ("convnext", {"smoa": {"experts": 3, "width": 4}, "head": {"bits": 2, "rank": 8}}),
    ],
)
def test_parts_keep_their_promises_on_backbones_that_give_maps(
    family: str,
    recipe: dict[str, Any],
    families: Mapping[str, Backbone],
    random_selection: Select,
) -> None:
    backbone = load_backbone(families[family], Input(size_px=32), gives_maps=True)
    selected = random_selection(backbone, SELECTED)
    check_part(Recipe.model_validate(recipe), backbone, selected=selected)
