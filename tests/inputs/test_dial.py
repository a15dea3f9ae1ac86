"""The default search space: what is tried at which size."""

from __future__ import annotations

import itertools

import pytest

from pipeline.adaptation.packing import SizePlanner
from pipeline.backbones import load_backbone
from pipeline.inputs.preset import on_backbone
from pipeline.specs import Backbone, Head, Input, Recipe, Smoa, Task
from pipeline.specs.faults import validate
from pipeline.specs.recipe import PARTS

VIT_S = Backbone(model="vit_small_patch16_224", arguments={"img_size": 32}, weights="random")


VIT_S_MAPS = Backbone(model="vit_small_patch16_224", arguments={"img_size": 64}, weights="random")
CONVNET = Backbone(model="tf_efficientnet_lite0", weights="random")
MASKS = {"kind": "segmentation", "data": {"format": "drawn", "kind": "shapes"}}


def resolved(backbone: Backbone, classes: int, **sections: object) -> tuple[Task, list[int]]:
    """A task without a recipe or search, on its backbone, and the largest sizes of its packs."""
    content = {"name": "a", "data": {"format": "digits"}, "backbone": backbone.model_dump()}
    names = [f"class {number}" for number in range(classes)]
    gives_maps = "kind" in sections
    loaded = load_backbone(
        backbone, Input(size_px=64 if gives_maps else None), gives_maps=gives_maps
    )
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
    pairs = itertools.pairwise(sorted(adapters))
    assert all(small < large <= 4 * small for small, large in pairs)


def test_every_kind_of_part_is_tried(tiny_backbone: Backbone) -> None:
    task, _ = resolved(tiny_backbone, 10)
    named = {
        part for point in task.search.configurations or () for part in point["parts"].split("+")
    }
    assert named == {"head", "connections", "biases", "norms", "smoa", "adapter", "lora"}


def test_the_first_few_configurations_cover_the_range() -> None:
    """The smallest pack, then both adapters at the budget, then at its middle."""
    task, sizes = resolved(VIT_S, 10, search={"trials": 5}, budget={"max_bytes": 65536})
    assert [point["parts"] for point in task.search.configurations or ()][:5] == [
        "head",
        *("adapter", "lora") * 2,
    ]
    assert 4 * sizes[0] < max(sizes[3:5]) < 16384 < 32768 < min(sizes[1:3])


@pytest.mark.parametrize(
    ("model", "scale"),
    [("vit_tiny_patch16_224", 4), ("vit_small_patch16_224", 2), ("vit_base_patch16_224", 2)],
)
def test_the_scale_of_lora_falls_as_the_backbone_widens(model: str, scale: float) -> None:
    backbone = VIT_S.model_copy(update={"model": model})
    points = resolved(backbone, 10)[0].search.configurations or ()
    assert {point["scale"] for point in points if point["parts"] == "lora"} == {scale}


def test_both_numbers_of_connections_are_tried(tiny_backbone: Backbone) -> None:
    recipe = {"preset": "default", **dict.fromkeys(("biases", "smoa", "norms", "adapter", "lora"))}
    task, _ = resolved(tiny_backbone, 10, recipe=recipe, budget={"max_bytes": "64KiB"})
    points = task.search.configurations or ()
    assert {point.get("top_k", 0) for point in points} == {0, 1, 3}


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


@pytest.mark.parametrize(("classes", "max_bytes"), [(102, 4096), (102, 8192), (1000, 65536)])
def test_beside_parts_a_head_that_would_fill_the_budget_reads_a_subspace(
    classes: int, max_bytes: int
) -> None:
    task, sizes = resolved(VIT_S, classes, budget={"max_bytes": max_bytes})
    points = task.search.configurations or ()
    assert max_bytes / 2 < max(sizes) <= max_bytes
    beside = [point for point in points if point["parts"] != "head"]
    assert len({point["head_rank"] for point in beside}) == 1
    assert any("adapter" in point["parts"] for point in beside)
    alone = [point.get("head_rank", 384) for point in points if point["parts"] == "head"]
    assert max(alone) > beside[0]["head_rank"], "the head alone is tried wider"
    assert points[0] == {"parts": "head", "head_bits": 1, "head_rank": beside[0]["head_rank"]}


def test_a_thousand_classes_in_eight_kib_have_a_narrow_head_without_a_bias() -> None:
    task, (size_bytes,) = resolved(VIT_S, 1000, budget={"max_bytes": 8192})
    assert task.search.configurations == (
        {"parts": "head", "head_bits": 1, "head_rank": 8, "head_bias": False},
    )
    assert size_bytes <= 8192


def test_where_nothing_fits_the_smallest_pack_is_left_to_be_named() -> None:
    task, sizes = resolved(VIT_S, 10, budget={"max_bytes": 300})
    (point,) = task.search.configurations or ()
    assert point == {"parts": "head", "head_bits": 1, "head_rank": 8, "head_bias": False}
    assert sizes[0] > 300


def test_the_space_is_the_same_every_time(tiny_backbone: Backbone) -> None:
    assert resolved(tiny_backbone, 10) == resolved(tiny_backbone, 10)


def test_of_maps_all_but_the_smallest_pack_fuse_several(tiny_backbone: Backbone) -> None:
    for max_bytes in (4096, 65536):
        task, sizes = resolved(tiny_backbone, 4, budget={"max_bytes": max_bytes}, **MASKS)
        smallest, *others = task.search.configurations or ()
        assert smallest == {"parts": "head", "head_bits": 1}
        assert (sizes[0], max(sizes) <= max_bytes) == (min(sizes), True)
        assert len(others) > 5
        recipes = [task.search.recipe(task.recipe, point) for point in others]
        assert all(recipe.head.fuse for recipe in recipes)
        alone = [each.head.fuse for each in recipes if names_in(each) == []]
        assert len(alone) > 2, "decoders of several widths"
        beside = {each.head.fuse for each in recipes if names_in(each)}
        assert beside == {16}


def names_in(recipe: Recipe) -> list[str]:
    """The parts of a recipe beside its head."""
    return [part for part in PARTS if getattr(recipe, part) is not None]


def test_a_decoder_that_would_fill_the_budget_reads_a_subspace() -> None:
    small, _ = resolved(VIT_S_MAPS, 2, budget={"max_bytes": 8192}, **MASKS)
    large, _ = resolved(VIT_S_MAPS, 2, budget={"max_bytes": 65536}, **MASKS)
    for task, rank in ((small, 128), (large, None)):
        beside = [point for point in task.search.configurations or () if "width" in point]
        assert {point.get("head_rank") for point in beside} == {rank}


def test_of_a_head_that_the_user_named_no_map_is_fused(tiny_backbone: Backbone) -> None:
    for recipe in (
        {"preset": "default", "head": {"bits": 4}},
        {"preset": "default", "from_block": 1},
    ):
        task, _ = resolved(tiny_backbone, 4, recipe=recipe, **MASKS)
        points = task.search.configurations or ()
        assert len(points) > 3
        assert not any("head_fuse" in point for point in points)


def test_lora_changes_convolutions_of_maps_where_there_is_no_attention() -> None:
    """Promising sets come before the head alone, although adapters have no place."""
    task, _ = resolved(CONVNET, 2, budget={"max_bytes": 65536}, **MASKS)
    points = task.search.configurations or ()
    assert [point["parts"] for point in points][:3] == ["head", "lora", "lora"]
    recipe = task.search.recipe(task.recipe, points[1])
    assert recipe.lora is not None
    assert recipe.lora.targets == ("conv_pw", "conv_pwl")
    assert task.search.recipe(task.recipe, points[0]).lora is None
    pooled, _ = resolved(CONVNET, 2)
    assert not any("lora" in point["parts"] for point in pooled.search.configurations or ())
