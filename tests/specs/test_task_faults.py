"""Misspelt keys and files that are no task are refused in one line that names the nearest known
key or the place in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_cases import for_every
from helpers_task_files import MINIMAL, few_examples, refusal, write
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SpecError, TaskpackError
from pipeline.specs import (
    Adapter,
    Backbone,
    Biases,
    Budget,
    ClassToken,
    Connections,
    Full,
    Head,
    Input,
    Lora,
    Norms,
    Prompts,
    Quantiser,
    SearchSpace,
    Selection,
    Smoa,
    Spec,
    Ssf,
    Task,
    Training,
)
from pipeline.specs.faults import validate

# --- unknown keys ---------------------------------------------------------------------------------

SECTIONS: dict[str, type[Spec]] = {
    "input": Input,
    "backbone": Backbone,
    "search": SearchSpace,
    "selection": Selection,
    "budget": Budget,
    "recipe.connections": Connections,
    "recipe.biases": Biases,
    "recipe.smoa": Smoa,
    "recipe.norms": Norms,
    "recipe.adapter": Adapter,
    "recipe.lora": Lora,
    "recipe.ssf": Ssf,
    "recipe.prompts": Prompts,
    "recipe.class_token": ClassToken,
    "recipe.full": Full,
    "recipe.quantiser": Quantiser,
    "recipe.head": Head,
    "recipe.training": Training,
}


@for_every("section", SECTIONS)
def test_a_misspelt_key_names_the_nearest_known_one(tmp_path: Path, section: str) -> None:
    for key in SECTIONS[section].model_fields:
        typo = key[:-1] + "_x" if len(key) > 4 else key + "s"
        content: dict[str, Any] = {typo: 7}
        for part in reversed(section.split(".")):
            content = (
                {part: content} if part != "recipe" else {part: {"preset": "default", **content}}
            )
        lines = refusal(write(tmp_path, MINIMAL | content)).splitlines()
        line = next(line for line in lines if f"{section}.{typo}: unknown key" in line)
        assert "given 7; " in line
        assert f"did you mean '{key}'?" in line


@for_every(
    ("typo", "meant"),
    [
        ("recipes", "recipe"),
        ("back_bone", "backbone"),
        ("budgets", "budget"),
        ("valfraction", "val_fraction"),
    ],
)
def test_a_misspelt_section_names_the_nearest_known_one(
    tmp_path: Path, typo: str, meant: str
) -> None:
    assert f"{typo}: unknown key, given 1; did you mean '{meant}'?" in refusal(
        write(tmp_path, MINIMAL | {typo: 1})
    )


def test_a_key_like_no_other_lists_the_known_ones(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, MINIMAL | {"budget": {"zzz": 1}}))
    assert "budget.zzz: unknown key, given 1; known keys: level, max_bytes" in message


@for_every(
    ("data", "meant"),
    [
        ({"train": "a", "tests": "b"}, "test"),
        ({"format": "folder", "train": "a", "test": "b", "vall": "c"}, "val"),
        ({"format": "csv", "train": "a", "test": "b", "roots": "c"}, "root"),
        ({"format": "digits", "seeds": 1}, "seed"),
        ({"format": "drawn", "kind": "counting", "sizepx": 32}, "size_px"),
    ],
)
def test_a_misspelt_data_key_is_matched_within_its_own_format(
    tmp_path: Path, data: dict[str, Any], meant: str
) -> None:
    assert f"did you mean '{meant}'?" in refusal(write(tmp_path, MINIMAL | {"data": data}))


def test_a_fault_in_data_is_reported_at_the_key_as_written(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL | {"data": {"train": 3}})
    assert refusal(path).splitlines() == [
        (
            f"{path}: data.train: given 3; Input should be a valid tuple or Input should be a valid"
            " string"
        ),
        f"{path}: data.test: missing; this key is required",
    ]


def test_another_formats_key_is_not_suggested(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, MINIMAL | {"data": {"format": "digits", "kind": "counting"}}))
    assert "known keys: format, seed, test_samples, train_samples" in message


def test_an_unknown_data_format_lists_the_known_ones(tmp_path: Path) -> None:
    message = refusal(
        write(tmp_path, MINIMAL | {"data": {"format": "foldr", "train": "a", "test": "b"}})
    )
    assert "foldr" in message
    assert all(name in message for name in ("shards", "folder", "csv", "digits", "drawn"))


# --- files that are no task -----------------------------------------------------------------------


@for_every("content", ["", "- a\n- b\n", "just text", "3", "null"])
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    assert refusal(path).startswith(f"{path}: expected a mapping of keys to values, found ")


@for_every("content", ["name: [", "a: b: c", "a: \0", "\tname: x", "name: *undefined"])
def test_broken_yaml_is_refused_with_its_file(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    assert refusal(path).startswith(f"{path}: not valid YAML: ")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert refusal(path).startswith(f"{path}: not valid YAML: ")


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch hacked']",
        "!!python/name:os.system",
        "!!python/object/new:os.system [id]",
        "!exec id",
    ],
)
def test_a_task_file_cannot_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, f"name: a\ndescription: {tag}\n")
    assert "not valid YAML: could not determine a constructor" in refusal(path)
    assert not (tmp_path / "hacked").exists()


def test_a_missing_file_and_a_folder_read_as_a_file_are_refused(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory); check the path" in refusal(
        tmp_path / "none.yaml"
    )
    assert "cannot be read (Is a directory)" in refusal(tmp_path)


key_text = st.text("aZ_.-0 é", max_size=6)


@for_every(
    "content",
    [
        "name: a\ndata: {2020-01-01: x}\nbackbone: {model: m}\n",
        "name: a\ndata: {format: digits}\nbackbone: {model: m}\nrecipe: &a {smoa: *a}\n",
        "name: a\ndescription: &a [*a]\n",
        "description: " + "[" * 5000 + "]" * 5000,
        "budget: {max_bytes: '" + "9" * 400 + ".5x'}",
    ],
)
def test_hostile_yaml_is_refused_like_any_other_fault(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    assert refusal(path).startswith(f"{path}: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(key_text, inner, max_size=3),
    max_leaves=6,
)


@few_examples
@given(st.dictionaries(st.sampled_from(sorted(Task.model_fields)), json_values, max_size=4))
def test_whatever_a_section_holds_it_is_read_or_refused_by_name(changes: dict[str, Any]) -> None:
    try:
        validate(Task, MINIMAL | changes, source="task.yaml")
    except SpecError as error:
        message = str(error)
    else:
        return
    assert all(line.startswith("task.yaml: ") for line in message.splitlines())


def test_a_spec_error_is_a_value_error_with_its_own_exit_code() -> None:
    assert issubclass(SpecError, ValueError)
    assert issubclass(SpecError, TaskpackError)
    assert SpecError.exit_code == 2
