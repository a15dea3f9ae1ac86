"""What an operator meets: moved work folders, other MLflow versions, signals, logs, aliases, long
plans.
"""

from __future__ import annotations

import io
import logging
import re
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_cases import for_every
from helpers_cli import (
    finished_run,
    new_workdir,
    one,
    taskpack,
    write_task,
)
from helpers_registry import champion
from rich.console import Console

from pipeline.adaptation import rank_indices
from pipeline.adaptation.packing import SizePlanner
from pipeline.adaptation.sites import weight_shapes
from pipeline.cli.progress import BatchProgress, PlanProgress
from pipeline.data import save_samples
from pipeline.driver.stages import LOG
from pipeline.errors import RegistryError
from pipeline.kinds import Outcomes
from pipeline.registry.alias import place_alias
from pipeline.registry.pack_record import RegisteredPack
from pipeline.registry.store import Registry, open_registry
from pipeline.search.kept_outcomes import write_outcomes
from pipeline.search.trial_record import TrialRecord
from pipeline.specs import Connections, Recipe, Selection, Task
from pipeline.training import Inputs


@pytest.fixture
def workdir(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return new_workdir(tmp_path_factory.getbasetemp(), tmp_path / "here")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return finished_run(tmp_path_factory.getbasetemp())


# --- a work folder that was moved or copied (mlflow#3144, mlflow#184) -----------------------------


def everything_in(database: Path) -> str:
    with sqlite3.connect(database) as connection:
        text = "\n".join(connection.iterdump())
    connection.close()
    return text


def test_a_moved_folder_is_read_and_written_where_it_is(workdir: Path, tmp_path: Path) -> None:
    before = open_registry(None, workdir)
    before.register(champion(tmp_path, accuracy=0.5))
    moved = tmp_path / "there with spaces, # and ü" / "work"
    moved.parent.mkdir()
    shutil.move(workdir, moved)
    registry = open_registry(None, moved)
    first = registry.get("digits")
    assert (
        registry.download(first, tmp_path / "copies").read_bytes()
        == champion(tmp_path, accuracy=0.5).pack_path.read_bytes()
    )
    assert registry.front(first)
    second = registry.register(champion(tmp_path, accuracy=0.9))
    for pack in (first, second):
        assert registry.download(pack, tmp_path / "copies").stat().st_size == pack.size_bytes
    assert not workdir.exists(), "nothing may be written to the former place"
    assert str(workdir) not in everything_in(moved / "mlflow.db"), (
        "MLflow's own pages find all files, too"
    )
    assert len(list(moved.glob("artifacts/**/pack.safetensors"))) == 2


def test_what_is_registered_in_a_copy_stays_out_of_the_original(
    workdir: Path, tmp_path: Path
) -> None:
    open_registry(None, workdir).register(champion(tmp_path, accuracy=0.5))
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    files = sorted(workdir.rglob("*"))
    database = everything_in(workdir / "mlflow.db")
    open_registry(None, copy).register(champion(tmp_path, accuracy=0.9))
    assert sorted(workdir.rglob("*")) == files
    assert everything_in(workdir / "mlflow.db") == database
    assert len(list(copy.glob("artifacts/**/pack.safetensors"))) == 2


def test_looking_up_under_another_path_does_not_disturb_a_run(
    workdir: Path, tmp_path: Path
) -> None:
    """One folder under two paths, such as a container's and its host's: only who registers says
    where the files are.
    """
    running = open_registry(None, workdir)
    running.register(champion(tmp_path, accuracy=0.5))
    seen = tmp_path / "seen"
    shutil.copytree(workdir, seen)
    before = (seen / "mlflow.db").read_bytes()
    looking = open_registry(None, seen)
    looking.download(looking.get("digits"), tmp_path / "copies")
    assert (seen / "mlflow.db").read_bytes() == before


def test_artifacts_that_are_kept_apart_from_the_database_stay_there(
    workdir: Path, tmp_path: Path
) -> None:
    apart = tmp_path / "apart"
    Registry(f"sqlite:///{workdir}/mlflow.db", None).client.delete_experiment(
        Registry(f"sqlite:///{workdir}/mlflow.db", None).store.experiment_id
    )
    with sqlite3.connect(workdir / "mlflow.db") as connection:
        connection.execute(
            "UPDATE experiments SET artifact_location = ?, lifecycle_stage = 'active' WHERE name ="
            " 'taskpack'",
            (apart.as_uri(),),
        )
    connection.close()
    open_registry(None, workdir).register(champion(tmp_path))
    assert one(apart.rglob("pack.safetensors"))
    assert not (workdir / "artifacts").exists()


def test_every_command_works_in_a_moved_work_folder(finished: Any, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished.workdir, moved)
    before = {path: path.stat().st_mtime_ns for path in (finished.workdir / "artifacts").rglob("*")}
    image = save_samples(moved / "data" / "bars", tmp_path / "images", count=1)[0]
    for command in (
        ("show", "bars"),
        ("predict", "bars", image),
        ("evaluate", "bars"),
        ("verify", "bars"),
        ("run", finished.task_file),
    ):
        answer = taskpack(*command, "--workdir", moved)
        assert (answer.code, answer.err) == (0, ""), command
    assert str(finished.workdir) not in everything_in(moved / "mlflow.db"), (
        "MLflow's own pages find the files after a run"
    )
    assert {
        path: path.stat().st_mtime_ns for path in (finished.workdir / "artifacts").rglob("*")
    } == before


# --- a database of another MLflow -----------------------------------------------------------------


def with_schema(workdir: Path, revision: str) -> None:
    with sqlite3.connect(workdir / "mlflow.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    connection.close()


def test_a_database_of_a_newer_mlflow_names_both_and_the_remedy(workdir: Path) -> None:
    import mlflow

    with_schema(workdir, "fffffffffff0")
    with pytest.raises(RegistryError) as caught:
        open_registry(None, workdir)
    message = str(caught.value)
    for expected in (
        "a newer MLflow wrote this database (schema fffffffffff0)",
        f"MLflow {mlflow.__version__}",
        "pip install --upgrade mlflow",
    ):
        assert expected in message
    assert "db upgrade" not in message, "MLflow cannot downgrade a database"


def test_a_database_of_an_older_mlflow_says_how_to_upgrade_it(workdir: Path) -> None:
    with_schema(workdir, "451aebb31d03")
    with pytest.raises(
        RegistryError,
        match=(
            r"an older MLflow wrote this database \(schema 451aebb31d03\).*mlflow db upgrade"
            r" sqlite:///"
        ),
    ):
        open_registry(None, workdir)


# --- the alias `champion` -------------------------------------------------------------------------


def test_a_smaller_and_worse_pack_does_not_take_the_alias(workdir: Path, tmp_path: Path) -> None:
    registry = open_registry(None, workdir)
    registry.register(champion(tmp_path, size_bytes=900, accuracy=0.9))
    rerun = champion(tmp_path, size_bytes=100, accuracy=0.8)
    worse = registry.register(rerun)
    assert (worse.version, worse.aliases) == (2, ())
    assert registry.get("digits").version == 1
    assert (
        worse.remark
        == "champion: stays digits/1; digits/1 (validation 90.0%, 900 bytes) is a better choice"
        " than digits/2 (validation 80.0%, 100 bytes) (--promote moves the alias nevertheless)"
    )
    promoted = registry.register(replace(rerun, promote=True))
    assert (promoted.version, promoted.aliases, promoted.remark) == (
        2,
        ("champion",),
        "champion: digits/2, promoted",
    )


def test_a_smaller_pack_takes_the_alias_unless_it_is_significantly_worse(
    workdir: Path, tmp_path: Path
) -> None:
    """Compared with the best of all versions, on the validation outputs they were registered
    with.
    """
    registry = open_registry(None, workdir)

    def register(size_bytes: int, wrong: list[int]) -> RegisteredPack:
        targets = np.arange(400) % 2
        choices = targets.copy()
        choices[wrong] ^= 1
        outcomes = tmp_path / f"{size_bytes}.safetensors"
        write_outcomes(outcomes, Outcomes(np.eye(2)[choices], targets))
        made = champion(tmp_path, size_bytes=size_bytes, accuracy=1 - len(wrong) / 400)
        return registry.register(replace(made, outcomes=outcomes, level=0.05))

    register(900, [*range(40)])
    smaller = register(100, [*range(10, 53)])
    assert smaller.aliases == ("champion",)
    creeping = register(90, [*range(20, 80)])
    assert creeping.aliases == (), "not worse than the champion, but than the best"
    assert registry.get("digits").version == smaller.version


@pytest.mark.parametrize("tag", ["data_digest", "validation"])
def test_packs_validated_on_other_data_are_not_compared(
    workdir: Path, tmp_path: Path, tag: str
) -> None:
    registry = open_registry(None, workdir)
    registry.register(replace(champion(tmp_path, accuracy=0.5), tags={tag: "a"}))
    other = registry.register(replace(champion(tmp_path, accuracy=0.9), tags={tag: "b"}))
    assert other.aliases == ()
    assert (
        "digits/2 was validated on other samples, so the two cannot be compared (--promote moves"
        " the alias to digits/2)" in other.remark
    )


def test_the_test_metric_has_no_part_in_the_choice(workdir: Path, tmp_path: Path) -> None:
    registry = open_registry(None, workdir)
    first, second = champion(tmp_path, accuracy=0.9), champion(tmp_path, accuracy=0.8)
    registry.register(replace(first, metrics={**first.metrics, "test_metric": 0.1}))
    assert (
        registry.register(replace(second, metrics={**second.metrics, "test_metric": 0.99})).aliases
        == ()
    )


def test_packs_of_earlier_releases_are_compared_too(workdir: Path, tmp_path: Path) -> None:
    """They do not say which samples were held out, only of which data."""
    registry = open_registry(None, workdir)
    registry.register(replace(champion(tmp_path, accuracy=0.9), tags={"data_digest": "a"}))
    worse = registry.register(
        replace(champion(tmp_path, accuracy=0.8), tags={"data_digest": "a", "validation": "v"})
    )
    assert worse.aliases == ()


def test_a_promoted_pack_keeps_the_alias_until_a_better_one_than_all_comes(
    workdir: Path, tmp_path: Path
) -> None:
    registry = open_registry(None, workdir)
    best = registry.register(champion(tmp_path, accuracy=0.9))
    small = registry.register(
        replace(champion(tmp_path, accuracy=0.7, size_bytes=50), promote=True)
    )
    between = registry.register(champion(tmp_path, accuracy=0.8))
    assert between.aliases == ()
    assert (
        place_alias(
            between, registry.get("digits"), [best, small, between], lambda pack: None, 0.5
        )[0].version
        == small.version
    )
    assert registry.register(champion(tmp_path, accuracy=0.95)).aliases == ("champion",)


# --- lines in a log -------------------------------------------------------------------------------


def test_a_log_has_one_plain_line_per_trial_and_fit(finished: Any) -> None:
    lines = finished.answer.out.splitlines()
    trials = [line for line in lines if ": trial " in line]
    assert len(trials) == 8
    assert [line.split("trial ")[1].split(":")[0] for line in trials] == [
        f"{number} of 8" for number in range(1, 9)
    ]
    pattern = (
        r"\[ *\d+\.\d s\] bars: trial \d of 8: (complete|stopped), validation 0\.\d{4}, \d+ bytes,"
        r" \d+\.\d s"
    )
    assert all(re.fullmatch(pattern, line) for line in trials), trials
    (fit,) = (line for line in lines if ": fit: test " in line)
    assert re.fullmatch(
        r"\[ *\d+\.\d s\] bars: fit: test accuracy [01]\.\d{4}, \d+ bytes, \d+\.\d s", fit
    )
    assert "\x1b" not in finished.answer.out


class Lines(io.StringIO):
    """Notes what had been written at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


def test_lines_are_flushed_and_plain_even_where_colour_is_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = Lines()
    with BatchProgress(Console(file=out), ["bars"]) as progress:
        progress.update("bars", "search", 0.0, "")
        LOG.info("%s: %s", "bars", "[bold] is text")
        assert out.flushed.splitlines()[1].endswith("s] bars: [bold] is text")
    LOG.info("after the end")
    assert "\x1b" not in out.getvalue()
    assert "after" not in out.getvalue()


def test_a_failed_trial_is_one_line() -> None:
    record = TrialRecord(
        id="t",
        point={},
        size_bytes=10,
        state="failed",
        curve=(0.5,),
        seconds=1.0,
        message="diverged at step 3\nTraceback",
    )
    assert record.line() == "failed, validation 0.5000, 10 bytes, 1.0 s - diverged at step 3"


def test_without_a_handler_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert not [handler for handler in LOG.handlers if not isinstance(handler, logging.NullHandler)]
    LOG.info("unseen")
    assert capsys.readouterr() == ("", "")


# --- plans ----------------------------------------------------------------------------------------


@for_every("level", ["neuron", "layer", "network"])
@for_every("top_k", [1, 3])
def test_bounds_hold_for_every_selection(tiny_inputs: Inputs, level: Any, top_k: int) -> None:
    task: Task = tiny_inputs.task.model_copy(
        update={"selection": Selection(level=level, batch_size=16)}
    )
    recipe = Recipe(connections=Connections(top_k=top_k))
    bounds = SizePlanner(task, tiny_inputs.backbone, tiny_inputs.index.classes)
    least, most = bounds.size_bytes(recipe), bounds.largest_bytes(recipe)
    shapes = weight_shapes(tiny_inputs.backbone.model)
    generator = torch.Generator().manual_seed(0)
    for skew in (0.0, 1.0, 8.0):  # of layers and of rows
        importance = {
            name: torch.rand(shape, generator=generator) for name, shape in shapes.items()
        }
        for weights in importance.values():
            weights *= (
                torch.rand(len(weights), 1, generator=generator) ** skew
                * torch.rand(1, generator=generator) ** skew
            )
        exact = SizePlanner(
            task,
            tiny_inputs.backbone,
            tiny_inputs.index.classes,
            rank_indices(importance, level, top_k),
        )
        assert exact.is_exact(recipe)
        assert least <= exact.size_bytes(recipe) == exact.largest_bytes(recipe) <= most
    assert most < 2 * least


def test_a_plan_without_selecting_gives_bounds_and_the_next_one_what_they_bound(
    tmp_path: Path,
) -> None:
    task_file = write_task(tmp_path)
    quick = taskpack(
        "plan", task_file, "--workdir", tmp_path / "work", "--no-select", "--json"
    ).json()
    assert not list((tmp_path / "work").glob("selections/*"))
    assert not quick["is_exact"]
    shown = taskpack("plan", task_file, "--workdir", tmp_path / "work", "--no-select")
    assert all(text in shown.words for text in ("at least", "at most", "the sizes are bounds"))
    full = taskpack("plan", task_file, "--workdir", tmp_path / "work")
    assert "selecting connections: 1 of 4 batches, about" in full.err
    exact = taskpack(
        "plan", task_file, "--workdir", tmp_path / "work", "--no-select", "--json"
    ).json()
    assert exact["is_exact"], "a selection that is kept is used"
    sizes = {str(row["point"]): row["size_bytes"] for row in exact["space"]}
    assert len(sizes) == 8
    for row in quick["space"]:
        assert row["at_least_bytes"] <= sizes[str(row["point"])] <= row["at_most_bytes"]


def test_a_plan_says_what_it_does_and_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 14.0, 15.0, 30.0, 31.0])
    monkeypatch.setattr("pipeline.cli.progress.time.monotonic", lambda: next(clock))
    out = io.StringIO()
    with PlanProgress(Console(file=out)) as progress:
        progress.step("preparing the data", 0, 0)
        for done in range(5):
            progress.step("selecting connections", done, 5)
    assert out.getvalue().splitlines() == [
        "selecting connections: 5 batches",
        "selecting connections: 1 of 5 batches, about 16 s left",
        "selecting connections: 3 of 5 batches, about 13 s left",
    ]
