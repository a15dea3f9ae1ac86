"""Methods side by side: the same share of each search space, the best on validation, one test per
seed; a method that does not fit is a row with its error, and the others go on."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import yaml
from helpers_cases import for_every
from helpers_cli import new_workdir, taskpack
from helpers_points import SOLIDS
from pydantic import ValidationError
from typer.testing import CliRunner

from pipeline.adaptation import plan
from pipeline.backbones import load_backbone
from pipeline.cli.app import app
from pipeline.data.drawn_solids import SOLIDS as SOLID_NAMES
from pipeline.data.drawn_solids import draw_solid
from pipeline.driver import compare as compare_module
from pipeline.driver.batch import run_batch
from pipeline.driver.compare import compare_methods, sampled_points
from pipeline.errors import SpecError
from pipeline.packs import read_pack
from pipeline.registry.connection import import_pyfunc
from pipeline.reports.bd_rate import Curve
from pipeline.reports.comparison import (
    comparison_csv,
    comparison_markdown,
    suite_scores,
    write_comparison,
)
from pipeline.reports.comparison_row import Comparison
from pipeline.search.trial_record import TrialJournal
from pipeline.specs import (
    Backbone,
    Input,
    Method,
    Recipe,
    SearchSpace,
    Selection,
    Suite,
    Task,
    Training,
)
from pipeline.specs.catalogue import known_methods, load_methods, tasks_to_compare
from pipeline.specs.task_files import load_task

RAY_CPUS = 1
METHODS = {
    "linear": Method(
        recipe=Recipe(), search=SearchSpace(learning_rate=(0.001, 0.003, 0.01, 0.03, 0.05, 0.1))
    ),
    "gps": Method.model_validate(
        {
            "recipe": {"connections": {"bits": 4}},
            "search": {"learning_rate": [0.003, 0.03], "head_bits": [4, 8]},
        }
    ),
    "random": Method.model_validate(
        {
            "recipe": {"connections": {}},
            "search": {"bits": [4, 8]},
            "selection": {"criterion": "random"},
        }
    ),
    "misfit": Method.model_validate(
        {"recipe": {"lora": {"targets": ["query"]}}, "search": {"learning_rate": [0.003, 0.03]}}
    ),
    "diverges": Method.model_validate(
        {"recipe": {"biases": {}}, "search": {"learning_rate": [1e30, 1e31]}}
    ),
}


@pytest.fixture(scope="module")
def compared(tiny_task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Task]:
    return tmp_path_factory.mktemp("compared"), tiny_task.model_copy(
        update={"recipe": Recipe(training=Training(epochs=2, batch_size=16, learning_rate=8e-3))}
    )


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("local_ray")
def test_methods_are_tuned_alike_tested_once_a_seed_and_resumed(
    compared: tuple[Path, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, task = compared
    rows = compare_methods([task], METHODS, workdir, seeds=2, fraction=0.5)
    assert [(row.task, row.method) for row in rows] == [("tiny", name) for name in METHODS]
    linear, gps, random, misfit, diverges = rows
    assert random.size_bytes < gps.size_bytes, "a pack of random connections stores no position"
    assert "matches no layer of VisionTransformer" in misfit.error
    assert "learning rate 1e+3" in diverges.error
    assert (linear.trials, gps.trials, random.trials) == (3, 2, 1), "half of 6, 4 and 2 points"
    for row, method in zip((linear, gps, random), METHODS.values(), strict=False):
        assert (len(row.test_metrics), row.test_samples, row.error) == (2, 40, "")
        recipe = method.on(task).search.recipe(method.on(task).recipe, row.point)
        journals = [TrialJournal(folder).read() for folder in workdir.glob("studies/*/compared")]
        records = [record for journal in journals for record in journal.values()]
        tried = [
            record.val_metric
            for record in records
            if record.point.keys() == row.point.keys() and record.val_metric is not None
        ]
        assert (len(tried), max(tried)) == (row.trials, row.val_metric)
        packs = [read_pack(path) for path in workdir.glob("studies/*/fits/*/pack.safetensors")]
        seeds = sorted(
            pack.metadata.seed
            for pack in packs
            if Recipe.model_validate(pack.metadata.recipe) == recipe
        )
        assert seeds == [0, 1], "one pack a seed"
    sizes = {path.stat().st_size for path in workdir.glob("studies/*/fits/*/pack.safetensors")}
    assert {linear.size_bytes, gps.size_bytes} <= sizes
    monkeypatch.setattr(
        compare_module._Driver, "resources", lambda driver: pytest.fail("nothing is left to run")
    )
    again = compare_methods(
        [task], {name: METHODS[name] for name in ("linear", "gps")}, workdir, seeds=2, fraction=0.5
    )
    assert again == [linear, gps]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("local_ray")
def test_a_time_limit_leaves_out_trials_of_every_method(
    compared: tuple[Path, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After half of 6 and of 4 points, one more of each; the fits run."""
    workdir, task = compared
    methods = {name: METHODS[name] for name in ("linear", "gps")}
    counts = iter([2, 0])
    monkeypatch.setattr(
        compare_module.ComparisonTime, "startable", lambda *args, **options: next(counts)
    )
    rows = compare_methods([task], methods, workdir, seeds=1, time_limit_seconds=3600)
    assert sum(row.trials for row in rows) == 3 + 2 + 2
    for row, planned in zip(rows, (6, 4), strict=True):
        assert planned // 2 <= row.trials < planned
        assert row.warning == f"{row.trials} of {planned} trials ran in the time limit"
        assert len(row.test_metrics) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("local_ray")
def test_clouds_take_the_same_way_as_images(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a task file to a compared, registered pack that predicts; here, where Ray runs."""
    workdir = new_workdir(tmp_path_factory.getbasetemp(), tmp_path)
    work, path = ("--workdir", workdir), tmp_path / "solids.yaml"
    recipe = {"adapter": {"width": 2}, "training": SOLIDS["recipe"]["training"]}
    search = {"trials": 2, "bits": [2, 4]}
    path.write_text(yaml.safe_dump({**SOLIDS, "recipe": recipe, "search": search}))
    (outcome,) = run_batch([load_task(path)], workdir)
    assert outcome.error is None
    cloud = draw_solid("torus", np.random.default_rng(5))
    head = "\n".join(["ply", "format ascii 1.0", f"element vertex {len(cloud)}"])
    columns = "\n".join(f"property float {axis}" for axis in "xyz")
    rows = "\n".join(" ".join(map(str, row)) for row in cloud.tolist())
    file = tmp_path / "torus.ply"
    file.write_text(f"{head}\n{columns}\nend_header\n{rows}\n")
    (row,) = taskpack("predict", "solids@champion", file, *work, "--json").json()
    assert (row["cloud"], row["label"] in SOLID_NAMES) == (str(file), True)
    assert "cloud" in taskpack("predict", "solids", file, *work).out
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workdir / 'mlflow.db'}")
        model = import_pyfunc().load_model("models:/solids@champion")
    assert model.predict({"cloud": [str(file)]})["label"].tolist() == [row["label"]]
    figure = tmp_path / "clouds.png"
    found = taskpack("evaluate", "solids", *work, "--json", "--figure", figure).json()
    assert found["test_metric"] == found["registered_test_metric"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    (compared_row,) = compare_methods(
        [load_task(path)], {"linear": METHODS["linear"]}, workdir, seeds=1, fraction=0.2
    )
    assert (compared_row.error, compared_row.test_samples) == ("", 60)


def test_what_a_time_limit_leaves_no_time_for_is_a_row_that_says_so(
    compared: tuple[Path, Task],
) -> None:
    workdir, task = compared
    rows = compare_methods([task], METHODS, workdir, time_limit_seconds=1e-6)
    assert [row.method for row in rows] == list(METHODS)
    assert all("tiny: not begun within the time limit" in row.error for row in rows)
    with pytest.raises(SpecError, match="time_limit_seconds: given -1"):
        compare_methods([task], METHODS, workdir, time_limit_seconds=-1)


@for_every("fraction", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_share_out_of_range_is_refused(compared: tuple[Path, Task], fraction: float) -> None:
    with pytest.raises(SpecError, match=r"--fraction: given .*, expected .* above 0 and at most 1"):
        compare_methods([compared[1]], METHODS, compared[0], fraction=fraction)


SPACES = [
    SearchSpace(learning_rate=(0.1,)),
    SearchSpace(learning_rate=(0.1, 0.2, 0.3, 0.4)),
    SearchSpace(learning_rate=(0.1, 0.2, 0.3, 0.4), head_bits=(1, 2, 4, 8, 16)),
]


@for_every(
    ("fraction", "sizes"),
    [(1.0, [1, 4, 20]), (0.5, [1, 2, 10]), (0.25, [1, 1, 5]), (1e-9, [1, 1, 1])],
)
def test_every_space_is_tried_by_the_same_share(fraction: float, sizes: list[int]) -> None:
    assert [len(sampled_points(space, fraction, 0)) for space in SPACES] == sizes


def test_a_whole_space_is_tried_in_its_order() -> None:
    assert [sampled_points(space, 1, 3) for space in SPACES] == [
        list(space.points()) for space in SPACES
    ]


def test_points_are_sampled_by_the_seed_and_a_larger_share_has_them_too() -> None:
    space = SPACES[2]
    quarter, half = (sampled_points(space, fraction, 0) for fraction in (0.25, 0.5))
    assert quarter == sampled_points(space, 0.25, 0)
    assert half[:5] == quarter
    assert all(half.count(point) == 1 for point in half)
    assert sampled_points(space, 0.5, 1) != half


def test_training_that_a_method_does_not_name_is_the_tasks(tiny_task: Task) -> None:
    method = Method.model_validate(
        {
            "recipe": {"full": {}, "training": {"weight_decay": 0.1}},
            "search": {"learning_rate": [0.1]},
        }
    )
    training = method.on(tiny_task).recipe.training
    assert training == tiny_task.recipe.training.model_copy(update={"weight_decay": 0.1})
    assert method.on(tiny_task).recipe.connections is None


def test_a_selection_that_a_method_does_not_name_is_the_tasks(tiny_task: Task) -> None:
    content = {"recipe": {"connections": {}}, "search": {"learning_rate": [0.1]}}
    task = tiny_task.model_copy(update={"selection": Selection(level="layer")})
    assert Method.model_validate(content).on(task).selection == Selection(level="layer")
    assert Method.model_validate({**content, "selection": {"criterion": "random"}}).on(
        task
    ).selection == Selection(criterion="random")
    with pytest.raises(ValidationError, match="selection would change nothing"):
        Method.model_validate(
            {
                "recipe": {"biases": {}},
                "search": {"learning_rate": [0.1]},
                "selection": {"level": "layer"},
            }
        )


# --- the catalogue's methods ----------------------------------------------------------------------


@for_every("name", known_methods())
def test_a_method_of_the_catalogue_fits_a_vit_and_has_enough_to_try(
    name: str, tiny_backbone: Backbone, tiny_task: Task
) -> None:
    method = load_methods([name])[name]
    assert method.description
    assert method.search.size() >= 4
    task = method.on(tiny_task)
    backbone = load_backbone(tiny_backbone, Input(size_px=32))
    assert all(
        plan(backbone, task.search.recipe(task.recipe, point), 3) for point in task.search.points()
    )


def test_methods_are_found_by_name_and_file_and_named_once(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("recipe: {biases: {}}\nsearch: {learning_rate: [0.1, 0.2]}\n")
    assert list(load_methods([str(own), "lora_1bit"])) == ["mine", "lora_1bit"]
    with pytest.raises(
        SpecError, match=r"lroa: no such method; expected a YAML file, or one of .*lora_1bit"
    ):
        load_methods(["lroa"])
    with pytest.raises(SpecError, match="given twice"):
        load_methods(["lora_1bit", "lora_1bit"])
    own.write_text("recipe: {biases: {}}\nsearch: {width: [8, 16]}\n")
    with pytest.raises(SpecError, match="width would change nothing"):
        load_methods([own])


@pytest.mark.parametrize(("tasks", "suite"), [([], None), ([Path("a.yaml")], "vtab1k")])
def test_tasks_come_from_files_or_from_a_suite(tasks: list[Path], suite: str | None) -> None:
    with pytest.raises(SpecError, match="either task files or --suite"):
        tasks_to_compare(tasks, suite, None)


# --- tables and figures ---------------------------------------------------------------------------


def row(
    method: str, size_bytes: int, *accuracies: float, task: str = "a", error: str = ""
) -> Comparison:
    errors = [(each * (1 - each) / 100) ** 0.5 for each in accuracies]
    return Comparison(
        **{
            "task": task,
            "method": method,
            "size_bytes": size_bytes,
            "test_metrics": accuracies,
            "test_errors": errors,
            "test_samples": 100,
            "val_metric": 0.5,
        },
        **{
            "trained_values": 10,
            "point": {"learning_rate": 0.01, "top_k": 2},
            "trials": 2,
            "error": error,
        },
    )


ROWS = [
    row("large", 5000, 0.8, 0.9),
    row("small", 1000, 0.5, 0.6),
    row("worse", 2000, 0.4, 0.4),
    row("misfit", 0, error="no place\nfor it"),
]


def test_the_error_of_a_mean_has_a_part_of_the_seeds_and_one_of_the_test_set() -> None:
    assert ROWS[0].test_metric == pytest.approx(0.85)
    assert ROWS[0].seed_deviation == pytest.approx(0.1 / 2**0.5)
    assert ROWS[0].standard_error == pytest.approx((0.05**2 + (0.8 * 0.2 + 0.9 * 0.1) / 200) ** 0.5)
    assert row("one", 1, 0.5).standard_error == pytest.approx(0.05)


def test_the_csv_holds_every_number() -> None:
    read = list(csv.DictReader(comparison_csv(ROWS).splitlines()))
    assert [float(line["test_metric"]) for line in read[:3]] == [
        fmean(each.test_metrics) for each in ROWS[:3]
    ]
    assert [line["bytes"] for line in read] == ["5000", "1000", "2000", ""]
    assert read[0]["tuned"] == '{"learning_rate": 0.01, "top_k": 2}'


def test_the_table_is_by_size_and_the_front_is_bold() -> None:
    lines = [
        line
        for line in comparison_markdown(ROWS, notes="Two seeds.").splitlines()
        if line.startswith("|")
    ]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "**small**",
        "worse",
        "**large**",
        "misfit",
    ]
    assert "| 85.0 ± 6.1 | 7.1 | 5,000 |" in lines[4]
    assert "learning_rate 0.01, top_k 2" in lines[4]
    assert "no place for it" in lines[5]
    assert len({line.count("|") for line in lines}) == 1


class _Tried:
    """A method whose trials have these bytes and this metric; its validation outputs are kept."""

    def __init__(self, method: str, sizes: list[float], metric: list[float], error: str = ""):
        self.method, self.error = method, error
        self._curve = Curve(np.array(sizes), np.array(metric), np.array([metric, metric]))

    def curve(self) -> Curve:
        return self._curve


@pytest.mark.parametrize(
    ("reference", "rates"), [(None, [None, -0.5, None, None]), ("half", [1.0, None, None, None])]
)
def test_bd_rates_are_relative_to_the_reference(
    reference: str | None, rates: list[float | None]
) -> None:
    tried: list[Any] = [
        _Tried("whole", [1000, 2000], [0.5, 0.6]),
        _Tried("half", [500, 1000], [0.5, 0.6]),
        _Tried("better", [500, 1000], [0.8, 0.9]),
        _Tried("misfit", [500, 1000], [0.5, 0.6], error="no place for it"),
    ]
    rows = [row(each.method, 1000, 0.5, error=each.error) for each in tried]
    compared = compare_module._with_bd_rates(tried, rows, reference)
    assert [each.bd_rate for each in compared] == [
        rate if rate is None else pytest.approx(rate) for rate in rates
    ]
    shown = "-50.0 ± 0.0" if reference is None else "+100.0 ± 0.0"
    assert shown in comparison_markdown(compared)


def test_a_reference_that_is_not_compared_is_refused(compared: tuple[Path, Task]) -> None:
    with pytest.raises(SpecError, match="--reference: best is not compared; expected one of"):
        compare_methods([compared[1]], METHODS, compared[0], reference="best")


def test_a_suites_averages_need_every_task() -> None:
    suite = Suite(name="pair", groups={"first": ("a",), "second": ("b", "c")})
    rows = [
        row("m", 10, 0.1),
        row("m", 20, 0.4, task="b"),
        row("m", 30, 0.7, task="c"),
        row("n", 10, 0.1),
    ]
    assert list(suite_scores(rows, suite)) == ["m"]
    assert suite_scores(rows, suite)["m"]["mean of 3 tasks"] == pytest.approx(40)
    table = comparison_markdown(rows, suite=suite)
    assert "| m | 20 | 10.00 | 55.00 | 40.00 | 32.50 |" in table


def test_what_is_written_depends_on_the_rows_alone(tmp_path: Path) -> None:
    first, again = (write_comparison(ROWS, tmp_path / name) for name in ("first", "again"))
    assert [path.name for path in first] == ["comparison.csv", "comparison.md", "a.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert first[2].read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in write_comparison(ROWS[3:], tmp_path / "failed")] == [
        "comparison.csv",
        "comparison.md",
    ]


def test_the_command_refuses_before_anything_runs(tmp_path: Path) -> None:
    answer = CliRunner().invoke(
        app, ["compare", "--methods", "lroa", "--workdir", str(tmp_path / "runs")]
    )
    assert isinstance(answer.exception, SpecError)
    assert not (tmp_path / "runs").exists()
