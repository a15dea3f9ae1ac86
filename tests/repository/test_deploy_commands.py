"""Commands in the files of deploy/ have options that exist, and name files that exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers_deploy import (
    DEPLOY,
    PROGRAMS,
    README,
    SHARED,
    command,
    command_lines,
    deploy_files,
    load,
    readme_lines,
)
from helpers_paths import PROJECT_ROOT

from pipeline.driver.jobs import describe
from pipeline.specs.task_files import load_tasks


def parse(command: Any, words: list[str]) -> None:
    """Parse the words as a command would: an error where an option does not exist, or an argument
    is missing. Typer and click are alike in this.
    """
    if words[-1] == "--help":
        return
    context = command.make_context(words[0], words[1:])
    if hasattr(command, "resolve_command"):
        name, inner, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        parse(inner, [name, *rest])


@pytest.mark.parametrize("program", ["taskpack", "ray", "mlflow"])
def test_command_lines_parse(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT_ROOT)  # the files they name are looked for from here
    lines = command_lines(program)
    assert len(lines) >= 2
    for words in lines:
        parse(command(program), words)


@pytest.mark.parametrize(
    "line",
    [
        "taskpack run tasks/demo --adress auto",
        "taskpack sumbit tasks/demo",
        "ray up --no-such deploy/aws.yaml",
        "mlflow server --prot=1",
    ],
)
def test_a_wrong_command_line_is_noticed(line: str) -> None:
    words = shlex.split(line)
    with pytest.raises(Exception, match=r"No such (option|command)"):
        parse(command(words[0]), words)


def test_programs_named_in_the_readme_are_known() -> None:
    assert {line.split()[0] for line in readme_lines()} <= set(PROGRAMS)


def test_the_jobs_tasks_are_in_the_image() -> None:
    words = shlex.split(load("kubernetes/rayjob.yaml")["spec"]["entrypoint"])
    folder = Path(words[2]).relative_to("/usr/local/share/taskpack")
    data_files = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "tool"
    ]["setuptools"]["data-files"]
    assert data_files[f"share/taskpack/{folder}"] == [f"tasks/{folder}/*"]
    assert load_tasks([PROJECT_ROOT / "tasks" / folder])
    workdir = Path(words[words.index("--workdir") + 1])
    assert workdir.is_relative_to(SHARED)


def test_the_first_batch_is_the_demos_on_the_image_and_can_be_submitted() -> None:
    (first,) = load_tasks([DEPLOY / "first.yaml"], expand=False)
    (demo,) = load_tasks([PROJECT_ROOT / "tasks/demo/digits.yaml"])
    apart = {"backbone": {"weights"}}
    assert first.model_dump(exclude=apart) == demo.model_dump(exclude=apart)
    assert Path(first.backbone.weights) == Path(
        "/usr/local/share/taskpack/demo", Path(demo.backbone.weights).name
    )
    submits = [words for words in command_lines("taskpack") if words[1] == "submit"]
    assert len(submits) == 2
    for words in submits:
        options = dict(zip(words[3::2], words[4::2], strict=True))
        assert words[2] == "deploy/first.yaml"
        assert options["--workdir"].startswith(f"{SHARED}/")
        assert describe(
            [first], workdir=options["--workdir"], shared=[Path(options["--shared"])]
        ).files.keys() == {"digits.yaml"}


def test_files_and_links_of_the_readme_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert [link for link in links if not (DEPLOY / link).exists()] == []
    named = set(re.findall(r"deploy/[\w./-]*\w", README)) - {"deploy/mlflow/.env"}
    assert [name for name in named if not (PROJECT_ROOT / name).exists()] == []
    shown = {str(path.relative_to(DEPLOY)) for path in deploy_files()} - {"README.md"}
    assert {
        re.sub(r"[`*]", "", cell)
        for cell in re.findall(r"^\| `([^|]+)` \|", README, flags=re.MULTILINE)
    } >= shown


def test_the_readme_says_that_no_engine_has_run_it() -> None:
    assert "No container engine, Kubernetes cluster or AWS account" in " ".join(README.split())
