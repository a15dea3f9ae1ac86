"""Examples in the documentation work: YAML files validate, commands and Python blocks run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import yaml
from helpers_cli import taskpack, write_task
from helpers_docs import DOCS, PAGES, blocks, name_of, prose, table_rows, taskpack_lines

import pipeline
from pipeline.backbones.known import remember
from pipeline.data import prepare, save_samples
from pipeline.driver.batch import TaskOutcome
from pipeline.driver.workspace import Workspace
from pipeline.registry.connection import import_mlflow
from pipeline.registry.pack_record import Champion
from pipeline.registry.store import open_registry
from pipeline.server.client import Client
from pipeline.specs import (
    DEFAULT_PARTS,
    Backbone,
    Budget,
    Method,
    Recipe,
    SearchSpace,
    Spec,
    Task,
)
from pipeline.specs.faults import validate
from pipeline.specs.recipe import DEFAULT_HEAD
from pipeline.specs.task_files import load_task
from pipeline.specs.yaml_files import load_spec
from pipeline.training import Inputs, open_inputs
from pipeline.training.fit import PACK_FILE, fit

SECTIONS: dict[str, type[Spec]] = {
    "backbone": Backbone,
    "budget": Budget,
    "method": Method,
    "recipe": Recipe,
    "search": SearchSpace,
    "points": SearchSpace,
}
FRAGMENT = {
    "name": "fragment",
    "data": {"format": "digits"},
    "backbone": {"model": "vit_tiny_patch16_224", "weights": "random"},
}


# --- YAML -----------------------------------------------------------------------------------------


def yaml_files(page: Path) -> list[tuple[str, str]]:
    """Each YAML block of a page with the file name that its first line gives."""
    found = []
    for block in blocks("yaml", page):
        name = re.match(r"# (\S+\.yaml)", block)
        assert name is not None, f"{name_of(page)}: the first line of a YAML block names its file"
        found.append((name[1], block))
    return found


WITH_YAML = [page for page in PAGES if blocks("yaml", page)]


def write_yaml(page: Path, folder: Path) -> None:
    """Write a page's YAML files, and those of the first page that they refer to; complete fragments
    of tasks.
    """
    files = {**dict(yaml_files(DOCS / "index.md")), **dict(yaml_files(page))}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.stem not in SECTIONS:
            text = yaml.safe_dump({**FRAGMENT, **yaml.safe_load(text)})
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("page", WITH_YAML, ids=name_of)
def test_yaml_files_are_valid(page: Path, tmp_path: Path) -> None:
    write_yaml(page, tmp_path)
    for name, _ in yaml_files(page):
        path = tmp_path / name
        if path.stem in SECTIONS:
            load_spec(SECTIONS[path.stem], path)
        else:
            load_task(path)


def test_sections_fit_the_task_they_are_given_to(tmp_path: Path) -> None:
    for page in (DOCS / "recipes.md", DOCS / "search.md"):
        write_yaml(page, tmp_path)
    names = ("recipe", "search", "budget")
    task = load_task(
        tmp_path / "flowers.yaml", overrides={name: tmp_path / f"{name}.yaml" for name in names}
    )
    assert task.backbone.model == "vit_small_patch16_224.augreg_in21k"
    assert task.recipe.norms is None
    assert f"the {task.search.size()} configurations above" in prose(DOCS / "search.md")
    assert task.search.size() > task.search.trials


def test_the_parts_listed_have_the_bits_they_default_to() -> None:
    rows = table_rows(DOCS / "recipes.md", "## The default parts")
    listed = {row[0].strip("`"): int(row[-1]) for row in rows}
    bits = {name: part.bits for name, part in DEFAULT_PARTS.items()}  # type: ignore[attr-defined]
    assert listed == {**bits, "head": DEFAULT_HEAD.bits}


def test_what_the_recipe_text_says_of_missing_parts_holds() -> None:
    longer = yaml.safe_load(dict(yaml_files(DOCS / "recipes.md"))["longer.yaml"])["recipe"]
    base = {"name": "a", "data": {"format": "digits"}, "backbone": {"model": "m"}}

    def parts(recipe: object) -> list[str]:
        read = validate(Task, {**base, "recipe": recipe}, source="test").recipe
        return [part for part in DEFAULT_PARTS if getattr(read, part) is not None]

    assert parts(longer) == [part for part in DEFAULT_PARTS if part != "norms"]
    assert parts({"preset": "linear"}) == []


# --- commands and Python, run on a registered pack ------------------------------------------------

RUN = ("ls", "show", "predict", "evaluate", "verify", "plan", "prepare")
"""The commands that are run. The others train, need a cluster, or need files that are not here."""
NEEDED = ("--backbone", "--figure", "--search", "MLFLOW", "$")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the examples name: a task, an image, and `runs` with a registered pack."""
    folder = tmp_path_factory.mktemp("examples")
    training = {"epochs": 1, "batch_size": 16, "precision": "fp32"}
    path = write_task(
        folder, recipe={"biases": {}, "training": training}, search={"head_bits": [4, 8]}
    )
    workspace = Workspace(folder / "runs")
    task = load_task(path)
    prepare(task, workspace.data(task.name))
    (folder / "image.png").write_bytes(
        save_samples(workspace.data(task.name), folder / "samples", count=1)[0].read_bytes()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        register(open_inputs(task, workspace.data(task.name)), workspace.root)
        yield folder


def register(inputs: Inputs, workdir: Path) -> None:
    """Fit the task's own recipe, without a search, and register the pack."""
    fitted = fit(inputs, inputs.task.recipe, None, workdir / "fit")
    remember(inputs.backbone.fingerprint, inputs.backbone.spec.weights)
    (workdir / "front.png").write_bytes(b"\x89PNG")
    scores = {"test_metric": fitted.test_metric, "test_metric_stderr": fitted.test_metric_stderr}
    champion = Champion(
        task=inputs.task.name,
        pack_path=workdir / "fit" / PACK_FILE,
        pack_digest=fitted.pack_digest,
        size_bytes=fitted.size_bytes,
        ledger=fitted.ledger,
        metrics={
            **scores,
            "val_metric": fitted.test_metric,
            "trained_values": fitted.trained_values,
            "search_seconds": 0.0,
            "fit_seconds": fitted.train_seconds,
        },
        params={},
        tags={
            "backbone": inputs.task.backbone.model,
            "backbone_fingerprint": inputs.backbone.fingerprint,
            "device": fitted.device,
        },
        front=[],
        front_figure=workdir / "front.png",
    )
    open_registry(None, workdir).register(champion)


def adapted(example: str) -> str:
    """The example with the fixture's task and image in place of those that it names."""
    example = re.sub(r"[\w/.-]+\.(?:png|jpg)\b", "image.png", example)
    example = re.sub(r"[\w/.-]*\b(?:flowers|digits|dtd)\.yaml", "bars.yaml", example)
    return re.sub(r"\b(?:flowers|digits|counting)\b", "bars", example)


def runnable() -> list[str]:
    lines = [line for line in taskpack_lines() if line.split()[1] in RUN]
    return [line for line in lines if not any(word in line for word in NEEDED)]


@pytest.mark.parametrize("line", runnable())
def test_a_command_runs(line: str, folder: Path) -> None:
    answer = taskpack(*shlex.split(adapted(line), comments=True)[1:])
    assert answer.code == 0, answer.err
    assert answer.out


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.split("\n", 1)[0])
def test_a_python_block_runs(
    block: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = TaskOutcome(task="bars", registered=pipeline.find("bars")[0])
    monkeypatch.setattr(pipeline, "run", create_autospec(pipeline.run, return_value=[outcome]))
    monkeypatch.setattr(Client, "predict", lambda *_: [{"task": "bars"}])
    try:
        exec(compile(adapted(block), "example", "exec"), {})
    finally:
        import_mlflow().set_tracking_uri(None)  # it is in the environment, too
    assert capsys.readouterr().out or "check_" in block  # checks say nothing if all is well
