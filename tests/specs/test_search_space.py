"""Search spaces and batches of task files: what is tried, and which combinations are refused."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_cases import for_every
from helpers_task_files import MINIMAL, few_examples, refusal, write
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import SpecError
from pipeline.specs import (
    BITS,
    DEFAULT_RECIPE,
    PARTS,
    Adapter,
    Biases,
    Connections,
    Full,
    Head,
    Lora,
    Norms,
    Prompts,
    Quantiser,
    Recipe,
    SearchSpace,
    Smoa,
    Ssf,
    default_space,
)
from pipeline.specs.faults import validate
from pipeline.specs.task_files import load_task, load_tasks

# --- batches --------------------------------------------------------------------------------------


def test_a_folder_gives_its_task_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path, MINIMAL | {"name": name}, f"{name}.{'yml' if name == 'c' else 'yaml'}")
    write(tmp_path, MINIMAL["backbone"], "backbone.yaml")
    write(tmp_path, "not a task", "notes.txt")
    assert [task.name for task in load_tasks([tmp_path])] == ["a", "b", "c"]


def test_a_task_without_data_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "a.yaml")
    write(tmp_path, {"name": "all", "groups": {"all": ["digits"]}}, "suite.yaml")
    assert [task.name for task in load_tasks([tmp_path])] == ["digits"]
    write(
        tmp_path,
        {"name": "b", "dta": {"format": "digits"}, "backbone": MINIMAL["backbone"]},
        "b.yaml",
    )
    with pytest.raises(SpecError, match="did you mean 'data'"):
        load_tasks([tmp_path])


def test_a_batch_keeps_the_order_given(tmp_path: Path) -> None:
    paths = [write(tmp_path, MINIMAL | {"name": name}, f"{name}.yaml") for name in ("z", "a", "m")]
    assert [task.name for task in load_tasks(paths)] == ["z", "a", "m"]


def test_overrides_reach_every_task_of_a_batch(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, MINIMAL | {"name": name}, f"{name}.yaml")
    assert {
        task.budget.max_bytes
        for task in load_tasks([tmp_path], overrides={"budget": {"max_bytes": 4096}})
    } == {4096}


def test_two_tasks_of_one_name_are_refused_with_both_files(tmp_path: Path) -> None:
    first, second = write(tmp_path, MINIMAL, "a.yaml"), write(tmp_path, MINIMAL, "b.yaml")
    with pytest.raises(SpecError, match="give each task of a batch its own name") as caught:
        load_tasks([first, second])
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)
    assert "'digits'" in str(caught.value)


def test_a_path_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such task file or folder"):
        load_tasks([tmp_path / "none"])
    write(tmp_path, MINIMAL["backbone"], "backbone.yaml")
    with pytest.raises(SpecError, match="holds no task file"):
        load_tasks([tmp_path])


# --- search spaces --------------------------------------------------------------------------------

AXES: dict[str, st.SearchStrategy[Any]] = {
    **{
        name: st.sampled_from(BITS)
        for name in ("bits", "connection_bits", "adapter_bits", "head_bits")
    },
    **{name: st.integers(0, 64) for name in ("experts", "top_k")},
    "width": st.integers(1, 1024),
    **{name: st.floats(1e-6, 10) for name in ("scale", "learning_rate")},
}
BASES = (
    Recipe(),
    DEFAULT_RECIPE,
    Recipe(connections=Connections(top_k=7, bits=1)),
    Recipe(smoa=Smoa(experts=9)),
    Recipe(adapter=Adapter(placement="after_mlp"), lora=Lora()),
)


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    names = draw(st.lists(st.sampled_from(sorted(AXES)), unique=True, max_size=4))
    return validate(
        SearchSpace,
        {name: draw(st.lists(AXES[name], min_size=1, max_size=3, unique=True)) for name in names},
        source="space",
    )


@few_examples
@given(spaces())
def test_a_space_is_the_product_of_its_axes(space: SearchSpace) -> None:
    points = list(space.points())
    axes = space.axes()
    assert len(points) == space.size()
    assert len({tuple(point.items()) for point in points}) == len(points)
    assert all(tuple(point) == tuple(axes) for point in points)
    assert {tuple(point.values()) for point in points} == set(itertools.product(*axes.values()))
    assert points == list(space.points())


def recipe_by_hand(base: Recipe, point: dict[str, Any]) -> dict[str, Any]:
    """The slow, obvious reading of a point: write each value into the recipe as plain data."""
    plain = base.model_dump()
    for axis, part, default in (
        ("top_k", "connections", Connections()),
        ("experts", "smoa", Smoa()),
    ):
        if axis in point:
            plain[part] = (
                {**(plain[part] or default.model_dump()), axis: point[axis]}
                if point[axis] > 0
                else None
            )
    for axis, part, key in (
        ("bits", "connections", "bits"),
        ("bits", "smoa", "bits"),
        ("connection_bits", "connections", "bits"),
        ("adapter_bits", "smoa", "bits"),
        *(
            (axis, part, "bits")
            for axis in ("bits", "adapter_bits")
            for part in ("adapter", "lora")
        ),
        ("width", "smoa", "width"),
        ("width", "adapter", "width"),
        ("width", "lora", "rank"),
        *(("scale", part, "scale") for part in ("smoa", "adapter", "lora")),
        ("head_bits", "head", "bits"),
        ("learning_rate", "training", "learning_rate"),
    ):
        if axis in point and plain[part] is not None:
            plain[part][key] = point[axis]
    return plain


@few_examples
@given(spaces(), st.sampled_from(BASES))
def test_every_point_gives_the_recipe_it_describes(space: SearchSpace, base: Recipe) -> None:
    before = base.model_dump_json()
    for point in space.points():
        recipe = space.recipe(base, point)
        assert recipe.model_dump() == recipe_by_hand(base, point)
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert base.model_dump_json() == before


CONFLICTING_BASES = (
    Recipe(connections=Connections(), quantiser=Quantiser(codebook="lloyd_max")),
    Recipe(full=Full()),
    Recipe(smoa=Smoa(experts=5, top_k=3), head=Head(bits=32)),
    Recipe(adapter=Adapter(), prompts=Prompts()),
    Recipe(
        smoa=Smoa(prompt_generator=True, placement="after_mlp"),
        adapter=Adapter(bits=32),
        quantiser=Quantiser(),
        ssf=Ssf(bits=16),
    ),
)


@few_examples
@given(spaces(), st.sampled_from(BASES + CONFLICTING_BASES))
def test_a_space_is_at_fault_exactly_where_one_of_its_points_is_no_recipe(
    space: SearchSpace, base: Recipe
) -> None:
    def is_recipe(point: dict[str, Any]) -> bool:
        try:
            Recipe.model_validate(recipe_by_hand(base, point))
        except ValidationError:
            return False
        return True

    fault = space.fault(base)
    assert (fault is None) == (
        not space.idle_axes(base) and all(is_recipe(point) for point in space.points())
    ), fault


def test_a_space_of_millions_of_points_is_checked_at_once() -> None:
    bits = dict.fromkeys(("connection_bits", "adapter_bits", "head_bits"), BITS)
    space = SearchSpace(
        **bits, experts=tuple(range(65)), top_k=tuple(range(65)), width=tuple(range(1, 200))
    )  # type: ignore[arg-type]
    started = time.perf_counter()
    fault = space.fault(DEFAULT_RECIPE.changed(quantiser=Quantiser()))
    assert fault is None, "its biases are always rounded"
    assert time.perf_counter() - started < 5


@few_examples
@given(spaces(), st.sampled_from(BASES))
def test_one_selection_serves_every_trial(space: SearchSpace, base: Recipe) -> None:
    used = [
        recipe.connections.top_k if recipe.connections else 0
        for recipe in (space.recipe(base, point) for point in space.points())
    ]
    assert space.max_top_k(base) == max(used)


def test_an_empty_space_is_one_trial_of_the_recipe_itself() -> None:
    space = SearchSpace()
    assert (space.size(), list(space.points())) == (1, [{}])
    assert space.recipe(DEFAULT_RECIPE, {}) == DEFAULT_RECIPE


def test_a_single_value_is_an_axis_of_one() -> None:
    space = validate(SearchSpace, {"bits": 4, "top_k": 0}, source="space")
    assert space.axes() == {"bits": (4,), "top_k": (0,)}


def test_bits_named_apart_win_over_bits() -> None:
    space = SearchSpace(bits=(8,), adapter_bits=(1,))
    recipe = space.recipe(DEFAULT_RECIPE, next(space.points()))
    assert recipe.connections is not None
    assert recipe.smoa is not None
    assert (recipe.connections.bits, recipe.smoa.bits) == (8, 1)


NAMED = DEFAULT_RECIPE.changed(preset=None)


def test_the_default_space_of_named_parts_holds_no_recipe_twice() -> None:
    space = default_space(NAMED)
    recipes = [space.recipe(NAMED, point).model_dump_json() for point in space.points()]
    assert len(set(recipes)) == len(recipes) == 8 <= space.trials
    assert space.max_top_k(NAMED) == 3
    assert default_space(DEFAULT_RECIPE).is_empty, "derived once the backbone is known"


# --- the parts themselves are searched ------------------------------------------------------------


def test_parts_are_taken_from_the_recipe_or_from_their_defaults() -> None:
    space = SearchSpace(parts=("head", "norms+adapter", "connections"), width=(4,), top_k=(0, 2))
    assert space.parts == ("head", "norms+adapter", "connections")
    base = Recipe(norms=Norms(bits=2), biases=Biases())
    recipe = space.recipe(base, {"parts": "norms+adapter", "width": 4, "top_k": 2})
    assert recipe == Recipe(norms=Norms(bits=2), adapter=Adapter(width=4, bits=1))
    assert space.recipe(base, {"parts": "head", "width": 4, "top_k": 2}) == Recipe()
    kept = space.recipe(base, {"parts": "connections", "width": 4, "top_k": 2})
    assert kept == Recipe(connections=Connections(top_k=2, bits=1))
    assert space.recipe(base, {"parts": "connections", "width": 4, "top_k": 0}) == Recipe()
    assert space.max_top_k(base) == 2
    assert [part.model_dump(exclude_none=True).keys() for part in space.fullest(base)]
    assert SearchSpace(parts=("adapter + norms",)).parts == ("norms+adapter",)


def test_bits_of_biases_and_norms_are_axes() -> None:
    base = Recipe(norms=Norms(), biases=Biases())
    space = SearchSpace(bias_bits=(1, 2), norm_bits=(1,))
    recipe = space.recipe(base, {"bias_bits": 2, "norm_bits": 1})
    assert recipe == Recipe(norms=Norms(bits=1), biases=Biases(bits=2))
    assert space.idle_axes(Recipe()) == ["bias_bits", "norm_bits"]


def test_every_part_of_any_recipe_is_rehearsed() -> None:
    space = SearchSpace(
        configurations=(
            {"parts": "norms", "norm_bits": 1},
            {"parts": "norms+adapter", "bits": 1},
            {"parts": "norms+smoa", "bits": 1},
            {"parts": "norms+adapter", "bits": 2},
        )
    )
    named = [
        {name for name in PARTS if getattr(recipe, name) is not None}
        for recipe in space.fullest(Recipe())
    ]
    assert named == [{"norms", "adapter"}, {"norms", "smoa"}]


def test_configurations_are_points_in_their_order() -> None:
    given = ({"bits": 4, "top_k": 2}, {"top_k": 0}, {"head_bits": 1})
    space = SearchSpace(configurations=given, trials=2)
    assert ([*space.points()], space.size(), space.axes()) == ([*given[:2]], 2, {})
    assert space.max_top_k(DEFAULT_RECIPE) == 2
    assert SearchSpace.model_validate_json(space.model_dump_json()) == space


@for_every(
    ("content", "message"),
    [
        ({"parts": ["wings"]}, "'wings' is no part; expected `head` for the head alone, or parts"),
        ({"configurations": []}, "expected at least one configuration"),
        ({"configurations": [{"bits": 1}, {"bit": 1}]}, "configuration 2: 'bit' is no axis"),
        ({"configurations": [{"bits": 99}]}, "configuration 1: "),
        ({"configurations": [{"bits": [1, 2]}]}, "configuration 1: expected one value per axis"),
        ({"configurations": [{"bits": 1}], "bits": [1]}, "configurations and bits are given"),
    ],
)
def test_parts_and_configurations_that_cannot_be_are_refused(
    content: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        validate(SearchSpace, content, source="space")


def test_a_search_that_names_no_axis_keeps_the_default_axes(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, MINIMAL), overrides={"search": {"trials": 3}})
    assert task.search.trials == 3
    assert task.search.axes() == default_space(DEFAULT_RECIPE).axes()


def test_the_default_preset_keeps_the_default_parts(tmp_path: Path) -> None:
    task = load_task(
        write(tmp_path, MINIMAL | {"recipe": {"preset": "default", "training": {"epochs": 3}}})
    )
    assert task.recipe.training.epochs == 3
    assert task.recipe.model_copy(update={"training": DEFAULT_RECIPE.training}) == DEFAULT_RECIPE


def test_a_linear_probe_searches_nothing_unless_told(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, MINIMAL | {"recipe": {"preset": "linear"}}))
    assert (task.search.axes(), task.search.size(), task.search.max_top_k(task.recipe)) == (
        {},
        1,
        0,
    )


@pytest.mark.parametrize(
    ("search", "idle"),
    [
        ({"width": [4, 8]}, "width"),
        ({"connection_bits": 4}, "connection_bits"),
        ({"bits": [1, 2]}, "bits"),
    ],
)
def test_an_axis_that_would_change_nothing_is_refused(
    tmp_path: Path, search: dict[str, Any], idle: str
) -> None:
    path = write(tmp_path, MINIMAL | {"recipe": {"connections": None}, "search": search})
    assert f"{idle} would change nothing" in refusal(path)


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(SpecError, match="the key 'name' is written twice"):
        load_task(path)
