"""What a user writes is read as meant, or refused with one line that says where, what was given and
what was expected.
"""

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import SpecError, TaskpackError
from pipeline.specs import (
    BITS,
    DEFAULT_RECIPE,
    About,
    Adapter,
    Backbone,
    Biases,
    Budget,
    ClassToken,
    Connections,
    DigitsData,
    Full,
    Head,
    Input,
    JsonData,
    Lora,
    Norms,
    Prompts,
    Quantiser,
    Recipe,
    SearchSpace,
    Selection,
    ShardsData,
    Smoa,
    Spec,
    Ssf,
    Task,
    Training,
    default_space,
    parse_bytes,
)
from pipeline.specs.faults import validate
from pipeline.specs.paths import DATA_ROOT
from pipeline.specs.task_files import load_task, load_tasks
from pipeline.specs.yaml_files import load_spec

few_examples = settings(max_examples=60, derandomize=True, deadline=None)

MINIMAL: dict[str, Any] = {
    "name": "digits",
    "data": {"format": "digits"},
    "backbone": {"model": "vit_tiny_patch16_224", "weights": "random"},
}


def write(folder: Path, content: Any, name: str = "task.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8"
    )
    return path


def refusal(path: Path, **options: Any) -> str:
    """The message with which `path` is refused."""
    with pytest.raises(SpecError) as caught:
        load_task(path, **options)
    return str(caught.value)


# --- sizes in bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
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


@pytest.mark.parametrize(
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


@pytest.mark.parametrize("value", [True, False, None, [1], {"a": 1}])
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


@pytest.mark.parametrize("size", [0, "0", "0.2B", "0KiB"])
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


@pytest.mark.parametrize(
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
    ids=lambda data: data["format"],
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


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": -1}, "seed"),
        ({"val_fraction": 0}, "val_fraction"),
        ({"val_fraction": 1}, "val_fraction"),
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
        ({"budget": {"within_points": -0.1}}, "budget.within_points"),
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


@pytest.mark.parametrize("name", ["v1a", "vit", "latest-2", "v", "7", "a.b_c-d", "a" * 63])
def test_a_name_that_only_resembles_a_reserved_one_is_fine(tmp_path: Path, name: str) -> None:
    assert load_task(write(tmp_path, MINIMAL | {"name": name})).name == name


@pytest.mark.parametrize(
    "name", ["", "A", "a b", "../up", "a/b", ".hidden", "-x", "a@b", "a\n", "é", "a" * 64, 10, None]
)
def test_a_name_that_is_no_file_and_registry_name_is_refused(tmp_path: Path, name: Any) -> None:
    assert ": name: given" in refusal(write(tmp_path, MINIMAL | {"name": name}))


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


@pytest.mark.parametrize("section", SECTIONS)
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


@pytest.mark.parametrize(
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
    assert "budget.zzz: unknown key, given 1; known keys: max_bytes, within_points" in message


@pytest.mark.parametrize(
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


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text", "3", "null"])
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    assert refusal(path).startswith(f"{path}: expected a mapping of keys to values, found ")


@pytest.mark.parametrize(
    "content", ["name: [", "a: b: c", "a: \0", "\tname: x", "name: *undefined"]
)
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


@pytest.mark.parametrize(
    "content",
    [
        "name: a\ndata: {2020-01-01: x}\nbackbone: {model: m}\n",
        "name: a\ndata: {format: digits}\nbackbone: {model: m}\nrecipe: &a {smoa: *a}\n",
        "name: a\ndescription: &a [*a]\n",
        "description: " + "[" * 5000 + "]" * 5000,
        "budget: {max_bytes: '" + "9" * 400 + ".5x'}",
    ],
    ids=[
        "date as key",
        "mapping that holds itself",
        "list that holds itself",
        "nested very deep",
        "size of 400 digits",
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


# --- paths and shared sections --------------------------------------------------------------------


def test_relative_data_paths_start_at_the_task_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {
        "train": ["a-{0}.tar", "/abs/b.tar"],
        "val": "../val.tar",
        "test": "s3://bucket/test.tar",
        "classes": "classes.txt",
    }
    write(tmp_path, MINIMAL | {"data": data}, "tasks/task.yaml")
    monkeypatch.chdir(tmp_path)
    read = load_task(Path("tasks/task.yaml")).data
    assert isinstance(read, ShardsData)
    assert read.train == (str(tmp_path / "tasks/a-{0}.tar"), "/abs/b.tar")
    assert (read.val, read.test) == (str(tmp_path / "val.tar"), "s3://bucket/test.tar")
    assert read.classes == str(tmp_path / "tasks/classes.txt")


def test_class_names_are_not_taken_for_paths(tmp_path: Path) -> None:
    read = load_task(
        write(
            tmp_path,
            MINIMAL | {"data": {"train": "a.tar", "test": "b.tar", "classes": ["cat", "dog"]}},
        )
    ).data
    assert isinstance(read, ShardsData)
    assert read.classes == ("cat", "dog")


@pytest.mark.parametrize("command", ["pipe:touch hacked", "pipe:cat s3://bucket/a.tar"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_shell_command_in_place_of_a_path_becomes_a_plain_path(
    tmp_path: Path, split: str, command: str
) -> None:
    data = {"train": "a.tar", "test": "b.tar", split: command}
    assert getattr(load_task(write(tmp_path, MINIMAL | {"data": data})).data, split) == str(
        (tmp_path / command).resolve()
    )


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("pretrained", "pretrained"),
        ("random", "random"),
        ("w.safetensors", "{folder}/w.safetensors"),
        ("/x/w.safetensors", "/x/w.safetensors"),
    ],
)
def test_weights_are_a_word_or_a_path_beside_the_file(
    tmp_path: Path, weights: str, expected: str
) -> None:
    task = load_task(write(tmp_path, MINIMAL | {"backbone": {"model": "m", "weights": weights}}))
    assert task.backbone.weights == expected.format(folder=tmp_path)


def test_a_section_given_by_path_equals_the_section_written_out(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "backbone": {"model": "m", "arguments": {"depth": 2}, "weights": "random"},
        "recipe": {"connections": {"top_k": 2}},
        "search": {"bits": [1, 8]},
        "budget": {"max_bytes": "8KiB"},
        "selection": {"temperature": 0.1},
    }
    for name, section in sections.items():
        write(tmp_path, section, f"common/{name}.yaml")
    by_path = load_task(
        write(
            tmp_path,
            MINIMAL | {name: f"../common/{name}.yaml" for name in sections},
            "tasks/a.yaml",
        )
    )
    assert by_path == load_task(write(tmp_path, MINIMAL | sections, "tasks/b.yaml"))


def test_paths_inside_a_shared_section_start_at_that_section(tmp_path: Path) -> None:
    write(tmp_path, {"model": "m", "weights": "w.safetensors"}, "common/backbone.yaml")
    task = load_task(
        write(tmp_path, MINIMAL | {"backbone": "../common/backbone.yaml"}, "tasks/a.yaml")
    )
    assert task.backbone.weights == str(tmp_path / "common/w.safetensors")


def test_a_shared_section_that_is_missing_or_no_mapping_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL | {"recipe": "none.yaml"})
    assert f"{path}: recipe: given 'none.yaml'; " in refusal(path)
    assert str(tmp_path / "none.yaml") in refusal(path)
    write(tmp_path, "- 1", "none.yaml")
    assert f"{tmp_path / 'none.yaml'}: expected a mapping" in refusal(path)


def test_a_fault_inside_a_shared_section_is_reported_under_its_own_file(tmp_path: Path) -> None:
    shared = write(tmp_path, {"smoa": {"expert": 3}}, "recipe.yaml")
    message = refusal(write(tmp_path, MINIMAL | {"recipe": "recipe.yaml"}))
    assert message == f"{shared}: smoa.expert: unknown key, given 3; did you mean 'experts'?"


def test_a_section_alone_is_read_as_its_kind(tmp_path: Path) -> None:
    assert load_spec(Budget, write(tmp_path, {"max_bytes": "2KiB"})).max_bytes == 2048
    with pytest.raises(SpecError, match="did you mean 'max_bytes'"):
        load_spec(Budget, write(tmp_path, {"max_byte": 1}))


# --- bases ----------------------------------------------------------------------------------------


def test_a_task_is_written_over_its_base_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, {"model": "m", "weights": "w.safetensors"}, "common/backbone.yaml")
    base = {
        "backbone": "backbone.yaml",
        "recipe": {"connections": {"top_k": 5, "bits": 1}, "training": {"epochs": 9}},
        "input": {"size_px": 96},
    }
    write(tmp_path, base, "common/base.yaml")
    own = {
        "recipe": {"connections": {"top_k": 2}, "training": {"batch_size": 8}},
        "input": {"flip": False},
    }
    task = load_task(
        write(
            tmp_path,
            {"base": "../common/base.yaml", "name": "a", "data": {"format": "digits"}, **own},
            "tasks/a.yaml",
        )
    )
    assert task.recipe == Recipe(
        connections=Connections(top_k=2, bits=1), training=Training(epochs=9, batch_size=8)
    )
    assert task.input == Input(size_px=96, flip=False)
    assert task.backbone == Backbone(model="m", weights=str(tmp_path / "common/w.safetensors"))


def test_bases_of_bases_and_values_that_are_no_mappings(tmp_path: Path) -> None:
    write(
        tmp_path,
        MINIMAL | {"search": {"bits": [1, 2, 4]}, "recipe": {"smoa": {}, "norms": {}}},
        "first.yaml",
    )
    write(tmp_path, {"base": "first.yaml", "description": "second"}, "second.yaml")
    task = load_task(
        write(
            tmp_path,
            {
                "base": "second.yaml",
                "name": "third",
                "search": {"bits": 8},
                "recipe": {"norms": None},
            },
        )
    )
    assert (task.name, task.description, task.search.bits) == ("third", "second", (8,))
    assert (task.recipe.smoa, task.recipe.norms) == (Smoa(), None)


def test_a_section_by_path_replaces_the_bases_whole(tmp_path: Path) -> None:
    write(tmp_path, {"smoa": {"experts": 2}}, "recipe.yaml")
    write(tmp_path, MINIMAL | {"recipe": {"norms": {}}}, "base.yaml")
    assert load_task(
        write(tmp_path, {"base": "base.yaml", "recipe": "recipe.yaml"})
    ).recipe == Recipe(smoa=Smoa(experts=2))


def test_data_start_from_the_bases_where_the_format_is_the_same(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL | {"data": {"train": "a.tar", "test": "b.tar"}}, "common/base.yaml")
    read = load_task(write(tmp_path, {"base": "common/base.yaml", "data": {"train": "c.tar"}})).data
    assert read == ShardsData(train=str(tmp_path / "c.tar"), test=str(tmp_path / "common/b.tar"))
    other = load_task(
        write(tmp_path, {"base": "common/base.yaml", "data": {"format": "digits", "seed": 3}})
    ).data
    assert other == DigitsData(format="digits", seed=3)


def test_overrides_are_written_over_the_bases_sections_too(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL | {"search": {"bits": [1, 2]}}, "base.yaml")
    task = load_task(
        write(tmp_path, {"base": "base.yaml"}),
        overrides={"search": {"trials": 3}, "data": {"train": "a.tar", "test": "/b.tar"}},
    )
    assert (task.search.bits, task.search.trials) == ((1, 2), 3)
    assert task.data == ShardsData(train=str(tmp_path / "a.tar"), test="/b.tar")


def test_a_base_that_is_none_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"base": "none.yaml", "name": "a"})
    assert (
        refusal(path)
        == f"{path}: base: given 'none.yaml'; expected the path of a task file to inherit from:"
        f" there is no {tmp_path / 'none.yaml'}"
    )
    assert "base: given 5; expected the path" in refusal(write(tmp_path, {"base": 5}))


def test_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    assert "cannot inherit from itself" in refusal(write(tmp_path, {"base": "task.yaml"}))
    write(tmp_path, {"base": "task.yaml"}, "other.yaml")
    assert f"{tmp_path / 'other.yaml'}: base: given 'task.yaml'" in refusal(
        write(tmp_path, {"base": "other.yaml"})
    )


def test_a_fault_names_the_bases_it_may_stand_in(tmp_path: Path) -> None:
    base = write(tmp_path, MINIMAL | {"recipee": {}}, "base.yaml")
    path = write(tmp_path, {"base": "base.yaml"})
    assert (
        refusal(path)
        == f"{path}, with its base {base}: recipee: unknown key, given {{}}; did you mean 'recipe'?"
    )


# --- where the data are ---------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["{folder}/data", "data", "~/data"])
def test_data_below_the_folder_that_the_machine_names(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(DATA_ROOT, root.format(folder=tmp_path))
    data = {
        "train": ["$TASKPACK_DATA/a.tar", "b.tar"],
        "test": "$TASKPACK_DATA",
        "classes": "$TASKPACK_DATA/classes.txt",
    }
    read = load_task(write(tmp_path, MINIMAL | {"data": data}, "tasks/a.yaml")).data
    assert isinstance(read, ShardsData)
    assert read.train == (str(tmp_path / "data/a.tar"), str(tmp_path / "tasks/b.tar"))
    assert (read.test, read.classes) == (str(tmp_path / "data"), str(tmp_path / "data/classes.txt"))


def test_the_folder_of_the_data_may_be_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_ROOT, "s3://bucket/data")
    read = load_task(
        write(tmp_path, MINIMAL | {"data": {"train": "$TASKPACK_DATA/a.tar", "test": "b.tar"}})
    ).data
    assert isinstance(read, ShardsData)
    assert read.train == "s3://bucket/data/a.tar"


def test_data_below_a_folder_that_nobody_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DATA_ROOT, raising=False)
    path = write(
        tmp_path, MINIMAL | {"data": {"format": "lists", "root": "$TASKPACK_DATA/x", "classes": 2}}
    )
    assert refusal(path).startswith(
        f"{path}: data.root: given '$TASKPACK_DATA/x', and TASKPACK_DATA is not set; set this"
        " environment variable"
    )


def test_no_other_variable_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s")
    monkeypatch.setenv(DATA_ROOT, "/d")
    read = load_task(
        write(
            tmp_path,
            MINIMAL | {"data": {"train": "$SECRET/a.tar", "test": "$TASKPACK_DATASETS/b.tar"}},
        )
    ).data
    assert isinstance(read, ShardsData)
    assert (read.train, read.test) == (
        str(tmp_path / "$SECRET/a.tar"),
        str(tmp_path / "$TASKPACK_DATASETS/b.tar"),
    )


def test_splits_of_listed_data_are_names_inside_their_root(tmp_path: Path) -> None:
    read = load_task(
        write(
            tmp_path,
            MINIMAL
            | {"data": {"format": "json", "root": "d", "train": "a.json", "classes": ["x", "y"]}},
        )
    ).data
    assert read == JsonData(
        format="json", root=str(tmp_path / "d"), train="a.json", classes=("x", "y")
    )


@pytest.mark.parametrize("classes", [1, 0, True, [], ["one"], 2.5, None, 65537])
def test_a_number_of_classes_that_is_none_is_refused_at_its_key(
    classes: Any, tmp_path: Path
) -> None:
    path = write(tmp_path, MINIMAL | {"data": {"format": "lists", "root": "d", "classes": classes}})
    assert refusal(path).startswith(f"{path}: data.classes: given ")
    assert "\n" not in refusal(path)


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


# --- overrides ------------------------------------------------------------------------------------


def test_an_override_replaces_a_recipe_whole(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL | {"recipe": {"connections": {"top_k": 5}, "norms": {}}})
    recipe = load_task(path, overrides={"recipe": {"smoa": {"experts": 2}}}).recipe
    assert (recipe.connections, recipe.norms, recipe.smoa) == (None, None, Smoa(experts=2))


def test_an_override_of_search_or_budget_keeps_the_other_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        MINIMAL | {"search": {"bits": [1, 2], "trials": 5}, "budget": {"within_points": 2}},
    )
    task = load_task(path, overrides={"search": {"trials": 3}, "budget": {"max_bytes": "8KiB"}})
    assert (task.search.bits, task.search.trials) == ((1, 2), 3)
    assert (task.budget.max_bytes, task.budget.within_points) == (8192, 2)


def test_an_override_by_path_resolves_beside_that_path(tmp_path: Path) -> None:
    other = write(
        tmp_path, {"model": "other", "weights": "w.safetensors"}, "elsewhere/backbone.yaml"
    )
    path = write(tmp_path, MINIMAL)
    for value in (other, str(other)):
        backbone = load_task(path, overrides={"backbone": value}).backbone
        assert (backbone.model, backbone.weights) == (
            "other",
            str(tmp_path / "elsewhere/w.safetensors"),
        )


def test_an_override_is_validated_like_the_file(tmp_path: Path) -> None:
    assert "did you mean 'recipe'?" in refusal(write(tmp_path, MINIMAL), overrides={"recipee": {}})
    assert "budget.max_bytes: given -1" in refusal(
        write(tmp_path, MINIMAL), overrides={"budget": {"max_bytes": -1}}
    )
    assert "none.yaml: cannot be read" in refusal(
        write(tmp_path, MINIMAL), overrides={"recipe": "none.yaml"}
    )


@pytest.mark.parametrize("section", ["budget", "search", "recipe", "backbone"])
@pytest.mark.parametrize("value", [None, 5, []])
def test_an_override_or_a_section_that_is_no_mapping_is_refused(
    tmp_path: Path, section: str, value: Any
) -> None:
    assert f": {section}: given " in refusal(write(tmp_path, MINIMAL), overrides={section: value})
    assert f": {section}: given " in refusal(write(tmp_path, MINIMAL | {section: value}))


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


def test_the_default_space_holds_no_recipe_twice() -> None:
    recipes = [
        default_space(DEFAULT_RECIPE).recipe(DEFAULT_RECIPE, point).model_dump_json()
        for point in default_space(DEFAULT_RECIPE).points()
    ]
    assert len(set(recipes)) == len(recipes) == 8 <= default_space(DEFAULT_RECIPE).trials
    assert default_space(DEFAULT_RECIPE).max_top_k(DEFAULT_RECIPE) == 3


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
