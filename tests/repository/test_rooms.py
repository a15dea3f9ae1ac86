"""The rooms of the package import each other as their docstrings and the architecture page say."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from helpers_paths import PROJECT_ROOT

PACKAGE = PROJECT_ROOT / "pipeline"
LIGHT = ("adaptation", "packs", "inputs", "training", "backbones", "data")
"""The rooms that run in a plain script, without Ray or MLflow."""


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            yield from (f"pipeline.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    modules = [name for name in imported_modules(path) if name.startswith("pipeline.")]
    return {name.split(".")[1] for name in modules} - {room_of(path)}


def test_every_room_imports_what_its_docstring_says() -> None:
    for init in PACKAGE.glob("*/__init__.py"):
        docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        said = re.search(r"^Imports: (.*)[.]$", docstring, flags=re.MULTILINE | re.DOTALL)
        assert said is not None, init
        imported = {room for path in init.parent.rglob("*.py") for room in imported_rooms(path)}
        assert set(said[1].replace("\n", " ").split(", ")) - {"nothing"} == imported, init


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    arrows: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        arrows[room_of(path)] |= imported_rooms(path)
    del arrows["__init__"]
    list(graphlib.TopologicalSorter(arrows).static_order())


def test_ray_and_mlflow_are_imported_only_where_the_map_says() -> None:
    users: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for module in imported_modules(path):
            users[module.split(".")[0]].add(room_of(path))
    text = " ".join((PROJECT_ROOT / "docs/architecture.md").read_text(encoding="utf-8").split())
    said = re.search(r"Ray is imported in (.*?) only, MLflow in (.*?) only", text)
    assert said is not None
    assert users["ray"] == set(re.findall(r"`(\w+)`", said[1]))
    assert users["mlflow"] == set(re.findall(r"`(\w+)`", said[2]))


def test_the_rooms_for_any_machine_load_neither_ray_nor_mlflow() -> None:
    paths = [path for room in LIGHT for path in (PACKAGE / room).rglob("*.py")]
    relative = [path.relative_to(PROJECT_ROOT) for path in paths if path.stem != "__init__"]
    modules = [".".join(path.with_suffix("").parts) for path in relative]
    script = (
        f"import importlib, sys\nfor name in {modules!r}:"
        " importlib.import_module(name)\nprint(sorted({'ray', 'mlflow'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT_ROOT)
    assert done.stdout.strip() == "[]"
