"""The documents tell the truth: commands parse, YAML validates, Python fits the package, numbers are the program's, and the map is the territory."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import inspect
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import pipeline
from pipeline import errors
from pipeline.cli.app import app
from pipeline.cli.tables import champions_table, ledger_table, packs_table
from pipeline.driver.batch import TaskOutcome
from pipeline.registry.pack_record import RegisteredPack
from pipeline.search.proposer import LAG
from pipeline.serving.predictor import Predictor
from pipeline.specs import DEFAULT_PARTS, Backbone, Budget, Head, Method, Recipe, SearchSpace, Spec, Task
from pipeline.specs.task_files import load_spec, load_task, validate
from pipeline.utils.signals import Terminated, exit_code

PROJECT_ROOT = Path(__file__).resolve().parent.parent
README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (PROJECT_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SECTIONS: dict[str, type[Spec]] = {"backbone": Backbone, "budget": Budget, "method": Method, "recipe": Recipe, "search": SearchSpace}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text as one line, so that it does not matter where its lines end."""
    return " ".join(text.split())


def taskpack_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith("taskpack ")]


def table_rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under `heading`, without its first two lines."""
    section = re.split(r"^#+ ", text.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


# --- commands -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", taskpack_lines())
def test_a_command_parses(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    COMMANDS[name].make_context(name, arguments)


def test_every_command_is_shown() -> None:
    assert {line.split()[1] for line in taskpack_lines()} | {"demo"} == COMMANDS.keys()


def test_options_named_in_the_text_exist() -> None:
    known = {option for command in COMMANDS.values() for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    named = {option for text in (README, ARCHITECTURE) for option in re.findall(r"`(--[a-z-]+)", text)}
    assert "--address" in named
    assert named <= known


def test_commands_said_to_take_json_are_those_that_do() -> None:
    sentence = re.search(r"[^.]*take `--json`", prose(README))
    assert sentence is not None
    assert set(re.findall(r"`([a-z]+)`", sentence[0])) == {
        name for name, command in COMMANDS.items() if any("--json" in parameter.opts for parameter in command.params)
    }


def test_the_sizes_shown_are_what_plan_prints(tmp_path: Path) -> None:
    shown = next(block for block in blocks("text") if block.startswith("Search space"))
    printed = CliRunner().invoke(app, ["plan", str(PROJECT_ROOT / "tasks/demo/digits.yaml"), "--workdir", str(tmp_path)])
    assert printed.exit_code == 0, printed.output
    lines = [line.split() for line in printed.output.splitlines()]
    start = lines.index(shown.splitlines()[0].split())
    assert lines[start : start + len(shown.splitlines())] == [line.split() for line in shown.splitlines()]


def test_the_ledger_shown_sums_to_its_file() -> None:
    ledger = next(block for block in blocks("text") if block.startswith("Bytes"))
    sizes = {name: int(size.replace(",", "")) for name, size in re.findall(r"^([a-z]+) +([0-9,]+)", ledger, flags=re.MULTILINE)}
    assert sizes.pop("file") == sum(sizes.values())


def test_the_tables_shown_have_the_columns_that_are_printed() -> None:
    heads = [" ".join(str(column.header) for column in table.columns) for table in (champions_table([]), packs_table([]), ledger_table({"head": 1}))]
    shown = [" ".join(line.split()) for block in blocks("text") for line in block.splitlines()]
    assert [head.strip() for head in heads if head.strip() not in shown] == []


def test_exit_codes_are_those_of_the_errors() -> None:
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and kind is not errors.TaskpackError]
    assert [int(row[0]) for row in table_rows(README, "## Exit codes")] == sorted(
        {0, *map(exit_code, (KeyboardInterrupt(), Terminated())), *(kind.exit_code for kind in kinds)}
    )


# --- YAML -----------------------------------------------------------------------------------------------------------------------------------


def yaml_files() -> list[tuple[str, str]]:
    """Each YAML block with the file name that its first line gives."""
    return [(re.match(r"# (\S+\.yaml)", block)[1], block) for block in blocks("yaml")]  # type: ignore[index]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's YAML files; fragments of a task are completed."""
    folder = tmp_path_factory.mktemp("readme")
    rest = {"name": "fragment", "data": {"format": "digits"}, "backbone": {"model": "vit_tiny_patch16_224", "weights": "random"}}
    for name, text in yaml_files():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        is_section = path.stem in SECTIONS
        path.write_text(text if is_section else yaml.safe_dump({**rest, **yaml.safe_load(text)}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", [name for name, _ in yaml_files()])
def test_a_yaml_file_is_valid(name: str, written: Path) -> None:
    path = written / name
    if path.stem in SECTIONS:
        load_spec(SECTIONS[path.stem], path)
    else:
        load_task(path)


def test_shared_sections_fit_the_task_they_are_given_to(written: Path) -> None:
    task = load_task(written / "flowers.yaml", overrides={section: written / f"{section}.yaml" for section in ("recipe", "search", "budget")})
    assert task.backbone.model == "vit_small_patch16_224.augreg_in21k"
    assert task.recipe.norms is None
    assert f"the {task.search.size()} points above" in prose(README)
    assert task.search.size() > task.search.trials


def test_the_parts_listed_have_the_bits_they_default_to() -> None:
    listed = {row[0].strip("`"): int(row[-1]) for row in table_rows(README, "## Choose a recipe")}
    assert listed == {"connections": 8, "head": Head().bits} | {name: part.bits for name, part in DEFAULT_PARTS.items()}  # type: ignore[attr-defined]


def test_what_the_recipe_text_says_of_missing_parts_holds(written: Path) -> None:
    base = {"name": "a", "data": {"format": "digits"}, "backbone": {"model": "m"}}
    longer = validate(Task, {**base, **yaml.safe_load((written / "longer.yaml").read_text())}, source="test").recipe
    probe = validate(Task, {**base, "recipe": {"preset": "linear"}}, source="test").recipe
    assert [part for part in DEFAULT_PARTS if getattr(longer, part) is None] == ["norms"]
    assert all(getattr(probe, part) is None for part in DEFAULT_PARTS)


# --- Python ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.split("\n", 1)[0])
def test_a_python_block_fits_the_package(block: str) -> None:
    kinds = {"outcome": TaskOutcome, "pack": RegisteredPack, "predictor": Predictor}
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "pipeline":
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(getattr(pipeline, node.func.attr)).bind(*node.args, **keywords)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "pipeline":
                assert node.attr in pipeline.__all__
            elif kind := kinds.get(node.value.id):
                fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
                assert node.attr in fields | set(dir(kind))


# --- files and rooms ------------------------------------------------------------------------------------------------------------------------


def test_files_and_links_named_in_the_documents_exist() -> None:
    for text, folder in ((README, PROJECT_ROOT), (ARCHITECTURE, PROJECT_ROOT / "docs")):
        links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
        named = re.findall(r"`((?:pipeline|docs|tasks|tests|benchmarks)/[^`\s*]+)`", text)
        named += [word for line in taskpack_lines() for word in line.split() if word.startswith("tasks/")]
        inside = [f"pipeline/{name}" for name in re.findall(r"`((?!pipeline/|tests/)[a-z_]+/[a-z_]+\.py)`", text)]
        missing = [name for name in (*named, *inside) if not (PROJECT_ROOT / name).exists()]
        assert missing + [link for link in links if not (folder / link).exists()] == []


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            yield from (f"pipeline.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_every_room_imports_what_its_docstring_says() -> None:
    package = PROJECT_ROOT / "pipeline"
    for room in (path for path in package.iterdir() if (path / "__init__.py").exists()):
        modules = {module.split(".")[1] for path in room.rglob("*.py") for module in imported_modules(path) if module.startswith("pipeline.")}
        docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
        said = re.search(r"^Imports: (.*)[.]$", docstring, flags=re.MULTILINE | re.DOTALL)
        assert said is not None, room
        assert set(said[1].replace("\n", " ").split(", ")) - {"nothing"} == modules - {room.name}, room


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    package = PROJECT_ROOT / "pipeline"
    arrows: dict[str, set[str]] = defaultdict(set)
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        arrows[room] |= {module.split(".")[1] for module in imported_modules(path) if module.startswith("pipeline.")} - {room}
    del arrows["__init__"]
    list(graphlib.TopologicalSorter(arrows).static_order())


def test_the_map_names_every_room() -> None:
    rooms = {path.name for path in (PROJECT_ROOT / "pipeline").iterdir() if (path / "__init__.py").exists()}
    assert {row[0].strip("`") for row in table_rows(ARCHITECTURE, "## Rooms")} == rooms


def test_ray_and_mlflow_are_imported_only_where_the_map_says() -> None:
    users: dict[str, set[str]] = defaultdict(set)
    for path in (PROJECT_ROOT / "pipeline").rglob("*.py"):
        for module in imported_modules(path):
            users[module.split(".")[0]].add(path.relative_to(PROJECT_ROOT / "pipeline").parts[0].removesuffix(".py"))
    assert users["ray"] == {"cluster", "driver", "search", "selection"}
    assert users["mlflow"] == {"registry"}


def test_the_rooms_for_any_machine_load_neither_ray_nor_mlflow() -> None:
    rooms = ("adaptation", "packs", "inputs", "training", "backbones", "data")
    paths = [path for room in rooms for path in (PROJECT_ROOT / "pipeline" / room).rglob("*.py")]
    modules = [".".join(path.relative_to(PROJECT_ROOT).with_suffix("").parts) for path in paths if path.stem != "__init__"]
    script = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint(sorted({{'ray', 'mlflow'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PROJECT_ROOT)
    assert done.stdout.strip() == "[]"


def test_the_map_states_the_lag_of_a_study() -> None:
    assert f"`LAG` ({LAG})" in prose(ARCHITECTURE)


def test_lines_are_short_enough_to_read() -> None:
    for text in (README, ARCHITECTURE):
        assert [line for line in text.splitlines() if len(line) > 150 and not line.startswith(("|", "!["))] == []
