"""The documentation is whole: every page is in the site, every link and file exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from helpers_cases import for_every
from helpers_docs import DOCS, PAGES, PROJECT_ROOT, name_of, read, table_rows, taskpack_lines

GENERATED = {"docs/architectures.md"}
"""Pages that a benchmark writes."""


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cli = (tmp_path / "reference/cli/index.html").read_text(encoding="utf-8")
    assert "--registry-patience" in cli
    task_file = (tmp_path / "reference/task-file/index.html").read_text(encoding="utf-8")
    assert "budget" in task_file
    api = (tmp_path / "reference/api/index.html").read_text(encoding="utf-8")
    assert "PackBackboneMismatch" in api


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.safe_load(re.sub(r"!!\S+", "", read(PROJECT_ROOT / "mkdocs.yml")))

    def pages(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return [page for value in entry.values() for page in pages(value)]
        return (
            [page for value in entry for page in pages(value)]
            if isinstance(entry, list)
            else [str(entry)]
        )

    listed = sorted(pages(config["nav"]))
    in_docs = [page.relative_to(DOCS).as_posix() for page in PAGES if page.is_relative_to(DOCS)]
    outside = [name_of(page) for page in PAGES if not page.is_relative_to(DOCS)]
    assert listed == sorted({*in_docs, *outside} - {"README.md"})


@for_every("page", PAGES)
def test_links_and_files_named_on_a_page_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []
    rooms = "pipeline|docs|tasks|tests|benchmarks|deploy"
    named = re.findall(rf"`((?:{rooms})/[^`\s*<]+)`", text)
    named += [
        f"pipeline/{name}"
        for name in re.findall(
            r"`((?!pipeline/|tests/|deploy/|benchmarks/)[a-z_]+/[a-z_]+\.py)`", text
        )
    ]
    named += [
        word for line in taskpack_lines(page) for word in line.split() if word.startswith("tasks/")
    ]
    missing = [name for name in named if not (PROJECT_ROOT / name).exists()]
    assert set(missing) <= {"deploy/mlflow/.env"}


def test_the_readme_is_short() -> None:
    assert len(read(PROJECT_ROOT / "README.md").splitlines()) <= 200


@for_every("page", PAGES)
def test_lines_are_short_enough_to_read(page: Path) -> None:
    if name_of(page) in GENERATED:
        return
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 100 and " " in line.strip()] == []


def test_the_map_names_every_room() -> None:
    rooms = {path.parent.name for path in (PROJECT_ROOT / "pipeline").glob("*/__init__.py")}
    rows = table_rows(DOCS / "architecture.md", "## Rooms")
    assert {row[0].strip("`") for row in rows} == rooms
