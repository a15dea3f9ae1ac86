"""The documentation as tests read it: pages, fenced blocks, commands and tables."""

from __future__ import annotations

import re
from pathlib import Path

from helpers_paths import PROJECT_ROOT

DOCS = PROJECT_ROOT / "docs"
PAGES = (
    *(PROJECT_ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    PROJECT_ROOT / "deploy" / "README.md",
    *sorted(DOCS.rglob("*.md")),
)


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(PROJECT_ROOT).as_posix()


def read(page: Path) -> str:
    """A page's text."""
    return page.read_text(encoding="utf-8")


def blocks(language: str, *pages: Path) -> list[str]:
    """The fenced blocks of a language on the pages; by default, on all of them."""
    found = []
    for page in pages or PAGES:
        found += re.findall(rf"^```{language}\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)
    return found


def prose(page: Path) -> str:
    """A page's text as one line, so that it does not matter where its lines end."""
    return " ".join(read(page).split())


def shell_lines(*pages: Path) -> list[str]:
    """The distinct lines of the `sh` blocks, continuation lines joined."""
    joined = (block.replace("\\\n", " ") for block in blocks("sh", *pages))
    return list(dict.fromkeys(line.strip() for block in joined for line in block.splitlines()))


def taskpack_lines(*pages: Path) -> list[str]:
    """The distinct `taskpack` commands."""
    return [line for line in shell_lines(*pages) if line.startswith("taskpack ")]


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table under `heading`, without its head."""
    below = read(page).split(f"{heading}\n", 1)[1]
    section = re.split(r"^#+ ", below, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
