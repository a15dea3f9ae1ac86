"""The task files that come with taskpack: each is valid, each says where its data comes from, and
each suite is what its benchmark's papers mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_cases import for_every
from helpers_paths import PROJECT_ROOT

from pipeline.errors import SpecError
from pipeline.reports.suite import suite_averages
from pipeline.specs import (
    Backbone,
    FolderData,
    Hdf5Data,
    JsonData,
    ListsData,
    Recipe,
    SearchSpace,
    Suite,
    Task,
)
from pipeline.specs.catalogue import SUITE_FILE, catalogue_folder, load_methods, load_suite
from pipeline.specs.paths import DATA_ROOT
from pipeline.specs.task_files import load_task, load_tasks
from pipeline.specs.yaml_files import load_spec

CATALOGUE = PROJECT_ROOT / "tasks"
FILES = sorted(CATALOGUE.rglob("*.y*ml"))
UNPUBLISHED = (
    CATALOGUE,
    *(CATALOGUE / name for name in ("demo", "segmentation", "points", "methods", "binary_adapter")),
)
PUBLISHED = [
    path
    for path in FILES
    if path.parent not in UNPUBLISHED and path.name not in (SUITE_FILE, "base.yaml")
]
DOWNLOADED = ("sam_vit_b_01ec64.safetensors", "point_mae.safetensors")
"""Weights that a file names and that its reader downloads."""
SUITES = sorted(path.parent.name for path in FILES if path.name == SUITE_FILE)

# From their papers (VPT, GPS): the mean of all tasks and, for VTAB-1k, the mean of the three group
# means.
AVERAGES = {
    "vtab1k": {
        "full fine-tuning": (65.57, 68.96),
        "linear probe": (52.94, 57.64),
        "GPS": (75.18, 77.47),
    },
    "fgvc": {"full fine-tuning": (88.54,), "linear probe": (79.32,), "GPS": (91.78,)},
}


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_ROOT, str(tmp_path / "datasets"))


def published(tasks: list[Task], method: str) -> dict[str, float]:
    """Each task's accuracy in percent by the one method whose name begins so."""
    return {
        task.name: next(
            value for name, value in task.about.published_percent.items() if name.startswith(method)
        )
        for task in tasks
    }


def read_any(path: Path, folder: Path) -> Any:
    """A file of the catalogue as what it is: a method, a task, a suite, a base that tasks start
    from, or a backbone.
    """
    if path.parent.name == "methods":
        return load_methods([path])
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == SUITE_FILE:
        return load_suite(path.parent)[0]
    if "model" in content:
        return load_spec(Backbone, path)
    if path.name in ("recipe.yaml", "search.yaml"):
        return load_spec(Recipe if path.stem == "recipe" else SearchSpace, path)
    if "name" in content:
        return load_task(path)
    data = {"format": "digits"}
    if content.get("modality") == "points":
        data = {"format": "drawn", "kind": "solids"}
    own: dict[str, Any] = {"base": str(path), "name": "any", "data": data}
    (folder / "any.yaml").write_text(yaml.safe_dump(own))
    return load_task(folder / "any.yaml")


# --- task files -----------------------------------------------------------------------------------


@for_every("path", FILES)
def test_a_shipped_file_is_valid(path: Path, tmp_path: Path) -> None:
    read = read_any(path, tmp_path)
    weights = read.backbone.weights if isinstance(read, Task) else getattr(read, "weights", "")
    if weights.endswith(".safetensors") and Path(weights).name not in DOWNLOADED:
        assert Path(path.parent, weights).is_file()


@for_every("path", PUBLISHED)
def test_a_published_dataset_says_where_it_comes_from_and_fits_its_backbone(path: Path) -> None:
    task = load_task(path)
    assert task.about.source
    assert task.about.licence
    assert task.about.paper
    assert task.description
    assert task.input.size_px == 224
    assert task.backbone.weights == "pretrained"
    assert isinstance(task.data, ListsData | JsonData | FolderData)
    assert (
        task.search.size() <= task.search.trials
    )  # the published recipe is a point that is tried, whatever else is
    assert task.recipe.connections is not None
    assert task.recipe.norms is task.recipe.smoa is None


def test_benchmarks_of_point_clouds_say_where_they_come_from_and_have_their_papers_shapes() -> None:
    paths = [path for path in FILES if path.parent.name == "points"]
    tasks = [load_task(path) for path in paths if "published_percent" in path.read_text()]
    assert len(tasks) == 1 + 3 + 4
    for task in tasks:
        about = task.about
        assert about.source and about.licence and about.paper and task.description  # noqa: PT018
        assert isinstance(task.data, Hdf5Data)
        groups = task.backbone.arguments.get("num_groups", 64)
        assert (task.input.points, groups) in ((1024, 64), (2048, 128))
    assert published(tasks, "full fine-tuning")["scanobjectnn-pb-t50-rs"] == 85.18


def test_one_line_changes_the_backbone_of_all_but_the_demo() -> None:
    tasks = [load_task(path) for path in PUBLISHED]
    assert len(tasks) == 19 + 5 + 25 + 2
    assert len({task.backbone.model_dump_json() for task in tasks}) == 1


def test_tasks_have_names_of_their_own_over_the_whole_catalogue() -> None:
    names = [
        load_task(path).name
        for path in FILES
        if "name" in (content := yaml.safe_load(path.read_text())) and "groups" not in content
    ]
    assert len(names) == len(set(names))


def test_classes_are_those_of_the_benchmarks() -> None:
    def classes(suite: str) -> dict[str, int]:
        return {task.name.split("-", 1)[1]: task.data.classes for task in load_suite(suite)[1]}  # type: ignore[union-attr]

    assert classes("vtab1k") == {
        **{
            "cifar100": 100,
            "caltech101": 102,
            "dtd": 47,
            "oxford_flowers102": 102,
            "oxford_iiit_pet": 37,
            "svhn": 10,
            "sun397": 397,
        },
        **{"patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5},
        **{"clevr_count": 8, "clevr_dist": 6, "dmlab": 6, "kitti": 4},
        **{"dsprites_loc": 16, "dsprites_ori": 16, "smallnorb_azi": 18, "smallnorb_ele": 9},
    }
    assert classes("fgvc") == {"cub": 200, "nabirds": 555, "flowers": 102, "dogs": 120, "cars": 196}


def test_the_folder_of_the_datasets_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_ROOT)
    with pytest.raises(SpecError, match=r"dtd\.yaml: data\.root: .*TASKPACK_DATA is not set"):
        load_task(CATALOGUE / "vtab1k" / "dtd.yaml")
    assert [task.name for task in load_tasks([CATALOGUE / "demo"])] == [
        "counting",
        "digits",
        "orientation",
    ]


# --- suites ---------------------------------------------------------------------------------------


def test_the_suites() -> None:
    assert SUITES == ["binary_adapter", "fewshot", "fgvc", "vtab1k"]
    assert catalogue_folder() == CATALOGUE
    assert {name: len(tasks) for name, tasks in load_suite("vtab1k")[0].groups.items()} == {
        "natural": 7,
        "specialized": 4,
        "structured": 8,
    }


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_its_tasks_in_its_order(name: str) -> None:
    suite, tasks = load_suite(name)
    assert suite.name == name
    assert tuple(task.name for task in tasks) == suite.tasks
    assert load_suite(CATALOGUE / name)[0] == suite


def test_overrides_reach_the_tasks_of_a_suite() -> None:
    assert {
        task.budget.max_bytes
        for task in load_suite("fgvc", overrides={"budget": {"max_bytes": "96KiB"}})[1]
    } == {96 * 1024}


def write_suite(folder: Path, groups: Mapping[str, Any], names: str = "ab") -> Path:
    for name in names:
        content = {"name": name, "data": {"format": "digits"}, "backbone": {"model": "m"}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (folder / SUITE_FILE).write_text(yaml.safe_dump({"name": "s", "groups": dict(groups)}))
    return folder


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"one": ["a"]}, "the task 'b' is in none of its groups"),
        ({"one": ["a"], "two": ["b", "c"]}, "the task 'c' has no task file next to it"),
        ({"one": ["a", "b"], "two": ["b"]}, "groups: given"),
        ({"one": ["a", "b"], "two": []}, "groups.two: given []"),
        ({}, "groups: given {}"),
    ],
)
def test_a_suite_that_is_not_its_folders_tasks_is_refused(
    groups: dict[str, list[str]], words: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError) as caught:
        load_suite(write_suite(tmp_path, groups))
    assert str(caught.value).startswith(f"{tmp_path / SUITE_FILE}: ")
    assert words in str(caught.value)


def test_a_folder_that_is_no_suite_does_not_hide_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fgvc").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_suite("fgvc")[0].name == "fgvc"


@pytest.mark.parametrize("name", ["vtab", "demo", "none/at/all"])
def test_an_unknown_suite_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        SpecError,
        match=rf"{name}: no such suite; .* or one of binary_adapter, fewshot, fgvc, vtab1k",
    ):
        load_suite(name)


# --- averages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name, methods in AVERAGES.items() for method in methods]
)
def test_published_accuracies_have_the_averages_that_their_papers_state(
    name: str, method: str
) -> None:
    suite, tasks = load_suite(name)
    averages = suite_averages(suite, published(tasks, method))
    means = [value for key, value in averages.items() if key.startswith("mean of")]
    assert means == pytest.approx(
        AVERAGES[name][method], abs=0.01
    )  # papers average what they rounded, or round last


def test_both_averages_by_name() -> None:
    suite = Suite(name="s", groups={"birds": ("a", "b", "c"), "digits": ("d",)})
    averages = suite_averages(suite, {"a": 0.1, "b": 0.2, "c": 0.3, "d": 1.0})
    assert list(averages) == ["birds (3)", "digits (1)", "mean of 4 tasks", "mean of 2 group means"]
    assert list(averages.values()) == pytest.approx([0.2, 1.0, 0.4, 0.6])


def test_a_suite_of_one_group_has_one_mean() -> None:
    assert suite_averages(Suite(name="s", groups={"all": ("a", "b")}), {"a": 1, "b": 2}) == {
        "mean of 2 tasks": 1.5
    }


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({"a": 1.0}, "no score for b; its averages need"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "c is not of this suite"),
        ({}, "no score for a, b"),
    ],
)
def test_there_is_no_average_over_some_of_the_tasks(scores: dict[str, float], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        suite_averages(Suite(name="s", groups={"all": ("a", "b")}), scores)
