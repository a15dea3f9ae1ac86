"""The default search space: what is tried at which size."""

from __future__ import annotations

import itertools

import pytest

from pipeline.adaptation.packing import SizePlanner
from pipeline.backbones import load_backbone
from pipeline.inputs.preset import on_backbone
from pipeline.specs import Backbone, Head, Input, Smoa, Task
from pipeline.specs.faults import validate

VIT_S = Backbone(model="vit_small_patch16_224", arguments={"img_size": 32}, weights="random")


def resolved(backbone: Backbone, classes: int, **sections: object) -> tuple[Task, list[int]]:
    """A task without a recipe or search, on its backbone, and the largest sizes of its packs."""
    content = {"name": "a", "data": {"format": "digits"}, "backbone": backbone.model_dump()}
    names = [f"class {number}" for number in range(classes)]
    loaded = load_backbone(backbone, Input())
    task, _ = on_backbone(validate(Task, {**content, **sections}, source="task"), loaded, names)
    planner = SizePlanner(task, loaded, names)
    points = task.search.configurations or ()
    recipes = [task.search.recipe(task.recipe, point) for point in points]
    return task, [planner.largest_bytes(recipe) for recipe in recipes]


@pytest.mark.parametrize(
    ("classes", "max_bytes"), [(10, 4096), (10, 65536), (102, 16384), (102, 65536), (10, 2**20)]
)
def test_the_sizes_go_from_the_head_alone_to_the_budget(classes: int, max_bytes: int) -> None:
    """One trial at least per halving of the budget, of which all fit."""
    task, sizes = resolved(VIT_S, classes, budget={"max_bytes": max_bytes})
    assert max(sizes) <= max_bytes
    assert task.search.configurations is not None
    assert task.search.configurations[0] == {"parts": "head", "head_bits": 1}
    assert sizes[0] == min(sizes)
    adapters = [
        size
        for size, point in zip(sizes, task.search.configurations, strict=True)
        if point["parts"] == "adapter"
    ]
    assert adapters
    pairs = itertools.pairwise(adapters)
    assert all(small < large <= 4 * small for small, large in pairs)


def test_every_kind_of_part_is_tried(tiny_backbone: Backbone) -> None:
    task, _ = resolved(tiny_backbone, 10)
    named = {
        part for point in task.search.configurations or () for part in point["parts"].split("+")
    }
    assert named == {"head", "connections", "biases", "norms", "smoa", "adapter", "lora"}


def test_parts_that_the_user_named_are_in_every_configuration(tiny_backbone: Backbone) -> None:
    recipe = {"preset": "default", "prompts": {"count": 2}, "smoa": None}
    task, _ = resolved(tiny_backbone, 10, recipe=recipe)
    sets = [point["parts"].split("+") for point in task.search.configurations or ()]
    assert all("prompts" in parts and "smoa" not in parts for parts in sets)
    assert any("adapter" in parts for parts in sets)


def test_what_the_user_said_of_a_part_or_the_head_stays(tiny_backbone: Backbone) -> None:
    recipe = {"preset": "default", "smoa": {"experts": 2, "width": 4}, "head": {"bits": 4}}
    task, _ = resolved(tiny_backbone, 10, recipe=recipe)
    points = task.search.configurations or ()
    assert len(points) > 3
    for point in points:
        tried = task.search.recipe(task.recipe, point)
        assert (tried.smoa, tried.head) == (Smoa(experts=2, width=4), Head(bits=4))


def test_below_the_head_of_the_whole_feature_there_are_heads_in_a_subspace() -> None:
    task, sizes = resolved(VIT_S, 102, budget={"max_bytes": 4096})
    ranks = [point["head_rank"] for point in task.search.configurations or ()]
    assert ranks == [128, 64, 32, 16]
    assert 2048 < max(sizes) <= 4096


def test_where_nothing_fits_the_smallest_pack_is_left_to_be_named() -> None:
    task, sizes = resolved(VIT_S, 10, budget={"max_bytes": 300})
    (point,) = task.search.configurations or ()
    assert point == {"parts": "head", "head_bits": 1, "head_rank": 16}
    assert sizes[0] > 300


def test_the_space_is_the_same_every_time(tiny_backbone: Backbone) -> None:
    assert resolved(tiny_backbone, 10) == resolved(tiny_backbone, 10)
