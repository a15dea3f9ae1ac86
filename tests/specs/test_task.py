"""What a user writes in a task file is read as meant, or refused with one line that says where,
what was given and what was expected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_cases import for_every
from helpers_task_files import MINIMAL, few_examples, refusal, write
from hypothesis import given
from hypothesis import strategies as st

from pipeline.specs import (
    DEFAULT_RECIPE,
    About,
    Task,
    default_space,
    parse_bytes,
)
from pipeline.specs.task_files import load_task

# --- sizes in bytes -------------------------------------------------------------------------------


@for_every(
    ("text", "size_bytes"),
    [
        (65536, 65536),
        ("65536", 65536),
        ("64KiB", 65536),
        ("64 kib", 65536),
        (" 1.5 MB ", 1_500_000),
        ("1MiB", 1 << 20),
        ("10B", 10),
        ("0.5KiB", 512),
        ("3KB", 3000),
    ],
)
def test_a_size_is_read_with_its_unit(text: str | int, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@for_every(
    "text",
    [
        "",
        "KiB",
        "-5",
        "64 kilo",
        "1.KB",
        "1,5MB",
        "0x10",
        "1e3",
        "64KiB64",
        "٣KB",
        "64KiB\n\nx",
        "1 2",
        "nan",
        "inf",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size in bytes such as"):
        parse_bytes(text)


@for_every("value", [True, False, None, [1], {"a": 1}])
def test_what_is_neither_text_nor_integer_is_no_size(value: Any) -> None:
    with pytest.raises(ValueError, match="expected a size in bytes such as"):
        parse_bytes(value)


@few_examples
@given(
    st.integers(0, 1 << 50),
    st.sampled_from([("", 1), ("B", 1), ("KB", 1000), ("KiB", 1024), ("MB", 10**6)]),
    st.sampled_from(["", " ", "  "]),
)
def test_whole_sizes_are_exact(count: int, unit: tuple[str, int], gap: str) -> None:
    count %= (1 << 53) // unit[1]
    for name in (unit[0], unit[0].lower(), unit[0].upper()):
        assert parse_bytes(f"{count}{gap}{name}") == count * unit[1]


def test_a_decimal_size_is_exact() -> None:
    """As binary fractions, 1.001 * 1000 falls short of 1001."""
    assert [parse_bytes(f"{count // 1000}.{count % 1000:03d}KB") for count in range(3000)] == list(
        range(3000)
    )
    assert parse_bytes("9007199254740993") == 9007199254740993
    assert parse_bytes("9" * 400) == int("9" * 400)


@for_every("size", [0, "0", "0.2B", "0KiB"])
def test_a_budget_of_nothing_is_refused(tmp_path: Path, size: Any) -> None:
    assert "budget.max_bytes: given" in refusal(
        write(tmp_path, MINIMAL | {"budget": {"max_bytes": size}})
    )


def test_a_budget_takes_a_unit(tmp_path: Path) -> None:
    assert (
        load_task(write(tmp_path, MINIMAL | {"budget": {"max_bytes": "16KiB"}})).budget.max_bytes
        == 16384
    )


# --- a task file ----------------------------------------------------------------------------------


def test_a_minimal_task_gets_the_defaults(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, MINIMAL))
    assert (task.recipe, task.search, task.budget.max_bytes, task.seed) == (
        DEFAULT_RECIPE,
        default_space(DEFAULT_RECIPE),
        65536,
        0,
    )
    assert task.data.format == "digits"


@for_every(
    "data",
    [
        {"format": "shards", "train": "train.tar", "test": "test.tar"},
        {"format": "folder", "train": "train", "test": "test"},
        {"format": "csv", "train": "train.csv", "test": "test.csv"},
        {"format": "lists", "root": "data", "classes": ["a", "b"]},
        {"format": "json", "root": "data", "classes": ["a", "b"]},
        {"format": "digits"},
        {"format": "drawn", "kind": "counting"},
    ],
)
def test_a_task_of_every_format_survives_its_own_json(data: dict[str, Any]) -> None:
    task = Task.model_validate(MINIMAL | {"data": data})
    assert Task.model_validate_json(task.model_dump_json()) == task
    assert Task.model_validate(yaml.safe_load(yaml.safe_dump(task.model_dump(mode="json")))) == task


def test_a_task_survives_its_own_json(tmp_path: Path) -> None:
    written = MINIMAL | {
        "search": {"bits": [1, 4], "scale": 0.5, "learning_rate": [1e-3, 3e-3]},
        "recipe": {"connections": {"top_k": 3, "bits": 2}, "smoa": {}, "training": {"epochs": 2}},
        "budget": {"max_bytes": "16KiB"},
        "input": {"mean": [0.1, 0.2, 0.3]},
        "backbone": {
            "model": "m",
            "weights": "random",
            "arguments": {"a": True, "b": 1, "c": 1.5, "d": [1, 2], "e": "x"},
        },
    }
    task = load_task(write(tmp_path, written))
    again = Task.model_validate_json(task.model_dump_json())
    assert again == task
    assert again.model_dump_json() == task.model_dump_json()
    assert [type(value) for value in again.backbone.arguments.values()] == [
        bool,
        int,
        float,
        list,
        str,
    ]


def test_a_task_cannot_be_changed_once_read(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        task.seed = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        task.recipe.head.bits = 1  # type: ignore[misc]


def test_every_fault_gets_a_line_with_file_key_given_and_expected(tmp_path: Path) -> None:
    path = write(
        tmp_path, MINIMAL | {"recipe": {"smoa": {"experts": 99}, "head": {"bits": 9}}, "seed": "x"}
    )
    lines = refusal(path).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert any("recipe.smoa.experts: given 99; " in line and "64" in line for line in lines)
    assert any(
        "recipe.head.bits: given 9; " in line and "1, 2, 3, 4, 5, 6, 7, 8, 16 or 32" in line
        for line in lines
    )
    assert any('seed: given "x"; ' in line and "integer" in line for line in lines)


@pytest.mark.parametrize("absent", ["name", "data", "backbone"])
def test_a_missing_section_is_named(tmp_path: Path, absent: str) -> None:
    path = write(tmp_path, {key: value for key, value in MINIMAL.items() if key != absent})
    assert refusal(path) == f"{path}: {absent}: missing; this key is required"


def test_a_long_value_is_cut_in_the_message(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, MINIMAL | {"seed": "x" * 10_000}))
    assert "..." in message
    assert len(message) < 400


@for_every(
    ("changes", "key"),
    [
        ({"seed": -1}, "seed"),
        ({"val_fraction": 0}, "val_fraction"),
        ({"val_fraction": 1}, "val_fraction"),
        ({"folds": 0}, "folds"),
        ({"folds": 5, "val_fraction": 0.3}, "folds"),
        ({"metric": "bleu"}, "metric"),
        ({"input": {"size_px": 4}}, "input.size_px"),
        ({"input": {"mean": [0.5, "x", 0.5]}}, "input.mean.1"),
        ({"recipe": {"connections": {"top_k": 0}}}, "recipe.connections.top_k"),
        (
            {"recipe": {"preset": "default", "training": {"learning_rate": 0}}},
            "recipe.training.learning_rate",
        ),
        (
            {"recipe": {"preset": "default", "training": {"learning_rate": float("nan")}}},
            "recipe.training.learning_rate",
        ),
        (
            {"recipe": {"preset": "default", "training": {"learning_rate": float("inf")}}},
            "recipe.training.learning_rate",
        ),
        (
            {"recipe": {"preset": "default", "training": {"precision": "fp16"}}},
            "recipe.training.precision",
        ),
        ({"search": {"bits": []}}, "search.bits"),
        ({"search": {"bits": [4, 9]}}, "search.bits.1"),
        ({"search": {"experts": [4, 65]}}, "search.experts.1"),
        ({"search": {"trials": 0}}, "search.trials"),
        ({"selection": {"batch_size": 1}}, "selection.batch_size"),
        ({"budget": {"level": 0.6}}, "budget.level"),
        ({"backbone": {"model": 5}}, "backbone.model"),
    ],
)
def test_a_value_out_of_range_is_refused_at_its_key(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    assert re.search(
        rf": {re.escape(key)}[a-z0-9_.]*: given ", refusal(write(tmp_path, MINIMAL | changes))
    )


@pytest.mark.parametrize("name", ["latest", "v1", "v20"])
def test_a_name_the_registry_keeps_for_itself_is_refused(tmp_path: Path, name: str) -> None:
    message = refusal(write(tmp_path, MINIMAL | {"name": name}))
    assert f": name: given \"{name}\"; the name '{name}' is reserved" in message
    assert "choose another" in message


@for_every("name", ["v1a", "vit", "latest-2", "v", "7", "a.b_c-d", "a" * 63])
def test_a_name_that_only_resembles_a_reserved_one_is_fine(tmp_path: Path, name: str) -> None:
    assert load_task(write(tmp_path, MINIMAL | {"name": name})).name == name


@for_every(
    "name", ["", "A", "a b", "../up", "a/b", ".hidden", "-x", "a@b", "a\n", "é", "a" * 64, 10, None]
)
def test_a_name_that_is_no_file_and_registry_name_is_refused(tmp_path: Path, name: Any) -> None:
    assert ": name: given" in refusal(write(tmp_path, MINIMAL | {"name": name}))


# --- about ----------------------------------------------------------------------------------------


def test_what_is_said_of_the_data_is_checked_like_the_rest(tmp_path: Path) -> None:
    about = {"source": "s", "licence": "CC0", "paper": "p", "published_percent": {"GPS": 81.1}}
    assert load_task(write(tmp_path, MINIMAL | {"about": about})).about == About(**about)
    assert "about.license: unknown key, given \"CC0\"; did you mean 'licence'?" in refusal(
        write(tmp_path, MINIMAL | {"about": {"license": "CC0"}})
    )
    assert "about.published_percent.GPS: given 811" in refusal(
        write(tmp_path, MINIMAL | {"about": {"published_percent": {"GPS": 811}}})
    )
