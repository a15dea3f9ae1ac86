"""Paths in task files, the files they inherit from, and overrides: each path is relative to the
file that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_cases import for_every
from helpers_task_files import MINIMAL, refusal, write

from pipeline.errors import SpecError
from pipeline.specs import (
    Backbone,
    Budget,
    CocoData,
    Connections,
    DigitsData,
    Input,
    JsonData,
    Recipe,
    ShardsData,
    Smoa,
    Training,
)
from pipeline.specs.paths import DATA_ROOT, local_paths
from pipeline.specs.task_files import load_task
from pipeline.specs.yaml_files import load_spec

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


def test_folders_of_annotated_images_start_at_the_task_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_ROOT, str(tmp_path / "store"))
    data = {"format": "coco", "train": "a.json", "test": "b.json"}
    for images, expected in (
        ("photos", str(tmp_path / "photos")),
        (
            {"train": "photos", "test": f"${DATA_ROOT}/b"},
            {"train": str(tmp_path / "photos"), "test": str(tmp_path / "store/b")},
        ),
    ):
        content = MINIMAL | {"kind": "segmentation", "data": {**data, "images": images}}
        task = load_task(write(tmp_path, content))
        assert isinstance(task.data, CocoData)
        assert task.data.images == expected
        assert str(tmp_path / "photos") in dict.fromkeys(path for _, path in local_paths(task))


def test_class_names_are_not_taken_for_paths(tmp_path: Path) -> None:
    read = load_task(
        write(
            tmp_path,
            MINIMAL | {"data": {"train": "a.tar", "test": "b.tar", "classes": ["cat", "dog"]}},
        )
    ).data
    assert isinstance(read, ShardsData)
    assert read.classes == ("cat", "dog")


@for_every("command", ["pipe:touch hacked", "pipe:cat s3://bucket/a.tar"])
@for_every("split", ["train", "val", "test"])
def test_a_shell_command_in_place_of_a_path_becomes_a_plain_path(
    tmp_path: Path, split: str, command: str
) -> None:
    data = {"train": "a.tar", "test": "b.tar", split: command}
    assert getattr(load_task(write(tmp_path, MINIMAL | {"data": data})).data, split) == str(
        (tmp_path / command).resolve()
    )


@for_every(
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


@for_every("classes", [1, 0, True, [], ["one"], 2.5, None, 65537])
def test_a_number_of_classes_that_is_none_is_refused_at_its_key(
    classes: Any, tmp_path: Path
) -> None:
    path = write(tmp_path, MINIMAL | {"data": {"format": "lists", "root": "d", "classes": classes}})
    assert refusal(path).startswith(f"{path}: data.classes: given ")
    assert "\n" not in refusal(path)


# --- overrides ------------------------------------------------------------------------------------


def test_an_override_replaces_a_recipe_whole(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL | {"recipe": {"connections": {"top_k": 5}, "norms": {}}})
    recipe = load_task(path, overrides={"recipe": {"smoa": {"experts": 2}}}).recipe
    assert (recipe.connections, recipe.norms, recipe.smoa) == (None, None, Smoa(experts=2))


def test_an_override_of_search_or_budget_keeps_the_other_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        MINIMAL | {"search": {"bits": [1, 2], "trials": 5}, "budget": {"level": 0.1}},
    )
    task = load_task(path, overrides={"search": {"trials": 3}, "budget": {"max_bytes": "8KiB"}})
    assert (task.search.bits, task.search.trials) == ((1, 2), 3)
    assert (task.budget.max_bytes, task.budget.level) == (8192, 0.1)


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


@for_every("section", ["budget", "search", "recipe", "backbone"])
@for_every("value", [None, 5, []])
def test_an_override_or_a_section_that_is_no_mapping_is_refused(
    tmp_path: Path, section: str, value: Any
) -> None:
    assert f": {section}: given " in refusal(write(tmp_path, MINIMAL), overrides={section: value})
    assert f": {section}: given " in refusal(write(tmp_path, MINIMAL | {section: value}))
