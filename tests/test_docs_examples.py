"""Examples in the documentation work: YAML files validate, commands and Python blocks run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers_cli import FinishedRun, finished_run, taskpack
from helpers_docs import DOCS, PAGES, blocks, name_of, prose, table_rows, taskpack_lines

from pipeline.data import save_samples
from pipeline.specs import (
    DEFAULT_PARTS,
    Backbone,
    Budget,
    Head,
    Method,
    Recipe,
    SearchSpace,
    Spec,
    Task,
)
from pipeline.specs.task_files import load_spec, load_task, validate

SECTIONS: dict[str, type[Spec]] = {
    "backbone": Backbone,
    "budget": Budget,
    "method": Method,
    "recipe": Recipe,
    "search": SearchSpace,
}
FRAGMENT = {
    "name": "fragment",
    "data": {"format": "digits"},
    "backbone": {"model": "vit_tiny_patch16_224", "weights": "random"},
}


# --- YAML ----------------------------------------------------------------------------------------


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
    """Write a page's YAML files, and those of the first page that they refer to; complete fragments of tasks."""
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
    task = load_task(tmp_path / "flowers.yaml", overrides={name: tmp_path / f"{name}.yaml" for name in names})
    assert task.backbone.model == "vit_small_patch16_224.augreg_in21k"
    assert task.recipe.norms is None
    assert f"the {task.search.size()} configurations above" in prose(DOCS / "search.md")
    assert task.search.size() > task.search.trials


def test_the_parts_listed_have_the_bits_they_default_to() -> None:
    rows = table_rows(DOCS / "recipes.md", "## The default parts")
    listed = {row[0].strip("`"): int(row[-1]) for row in rows}
    bits = {name: part.bits for name, part in DEFAULT_PARTS.items()}  # type: ignore[attr-defined]
    assert listed == {**bits, "head": Head().bits}


def test_what_the_recipe_text_says_of_missing_parts_holds() -> None:
    longer = yaml.safe_load(dict(yaml_files(DOCS / "recipes.md"))["longer.yaml"])["recipe"]
    base = {"name": "a", "data": {"format": "digits"}, "backbone": {"model": "m"}}

    def parts(recipe: object) -> list[str]:
        read = validate(Task, {**base, "recipe": recipe}, source="test").recipe
        return [part for part in DEFAULT_PARTS if getattr(read, part) is not None]

    assert parts(longer) == [part for part in DEFAULT_PARTS if part != "norms"]
    assert parts({"preset": "linear"}) == []


# --- commands and Python, run on a finished work folder ------------------------------------------

RUN = ("ls", "show", "predict", "evaluate", "verify", "plan", "prepare")
"""The commands that are run. The others train, need a cluster, or need files that are not here."""
NEEDED = ("--backbone", "--search", "MLFLOW", "$")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that has what the examples name: a finished work folder `runs`, task and image."""
    finished: FinishedRun = finished_run(tmp_path_factory.getbasetemp())
    assert finished.answer.code == 0, finished.answer.err
    folder = tmp_path_factory.mktemp("examples")
    (folder / "runs").symlink_to(finished.workdir)
    (folder / "backbone.yaml").write_text((finished.task_file.parent / "backbone.yaml").read_text())
    (folder / "bars.yaml").write_text(finished.task_file.read_text())
    save_samples(finished.workdir / "data" / "bars", folder / "samples", count=1)[0].rename(folder / "image.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def adapted(example: str) -> str:
    """The example with the finished run's task and image in place of those that it names."""
    example = re.sub(r"\S*\.(?:png|jpg)(?=[\s\"]|$)", "image.png", example.replace('"rose.jpg"', '"image.png"'))
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
def test_a_python_block_runs(block: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(adapted(block), "example", "exec"), {})
    assert capsys.readouterr().out
