"""Commands and numbers in the documentation are the program's."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import typer
from helpers_cases import for_every
from helpers_docs import DOCS, PAGES, PROJECT_ROOT, blocks, prose, read, table_rows, taskpack_lines
from typer.testing import CliRunner

from pipeline import errors
from pipeline.cli.app import app
from pipeline.cli.tables import champions_table, ledger_table, packs_table
from pipeline.search.proposer import LAG
from pipeline.utils.signals import Terminated, exit_code

README = PROJECT_ROOT / "README.md"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@for_every("line", taskpack_lines())
def test_a_command_parses(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    COMMANDS[name].make_context(name, arguments)


def test_every_command_is_shown() -> None:
    assert {line.split()[1] for line in taskpack_lines()} == COMMANDS.keys()


def test_options_named_in_the_text_exist() -> None:
    parameters = [parameter for command in COMMANDS.values() for parameter in command.params]
    known = {option for one in parameters for option in (*one.opts, *one.secondary_opts)}
    pages = [page for page in PAGES if "deploy" not in page.parts]  # which names others' options
    named = {option for page in pages for option in re.findall(r"`(--[a-z-]+)", read(page))}
    assert "--address" in named
    assert named - {"--help"} <= known


def test_commands_said_to_take_json_are_those_that_do() -> None:
    sentence = re.search(r"[^.]*take `--json`", prose(DOCS / "packs.md"))
    assert sentence is not None
    takes_json = {
        name
        for name, command in COMMANDS.items()
        if any("--json" in parameter.opts for parameter in command.params)
    }
    assert set(re.findall(r"`([a-z]+)`", sentence[0])) == takes_json


def test_the_sizes_shown_are_what_plan_prints(tmp_path: Path) -> None:
    shown = next(block for block in blocks("text") if block.startswith("Search space"))
    task = str(PROJECT_ROOT / "tasks/demo/digits.yaml")
    printed = CliRunner().invoke(app, ["plan", task, "--workdir", str(tmp_path)])
    assert printed.exit_code == 0, printed.output
    lines = [line.split() for line in printed.output.splitlines()]
    start = lines.index(shown.splitlines()[0].split())
    expected = [line.split() for line in shown.splitlines()]
    assert lines[start : start + len(expected)] == expected


def test_the_ledger_shown_sums_to_its_file() -> None:
    ledger = next(block for block in blocks("text") if block.startswith("Bytes"))
    rows = re.findall(r"^([a-z]+) +([0-9,]+)", ledger, flags=re.MULTILINE)
    sizes = {name: int(size.replace(",", "")) for name, size in rows}
    assert sizes.pop("file") == sum(sizes.values())


def test_the_tables_shown_have_the_columns_that_are_printed() -> None:
    tables = (champions_table([]), packs_table([]), ledger_table({"head": 1}))
    heads = [" ".join(str(column.header) for column in table.columns).strip() for table in tables]
    shown = [" ".join(line.split()) for block in blocks("text") for line in block.splitlines()]
    assert [head for head in heads if head not in shown] == []


def test_exit_codes_are_those_of_the_errors() -> None:
    named = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    codes = {kind.exit_code for kind in named if kind is not errors.TaskpackError}
    signals = {exit_code(KeyboardInterrupt()), exit_code(Terminated())}
    shown = [int(row[0]) for row in table_rows(DOCS / "errors.md", "## Exit codes")]
    assert shown == sorted({0, *codes, *signals})


def test_the_guarantees_state_the_lag_of_a_study() -> None:
    assert f"`LAG` ({LAG})" in prose(DOCS / "guarantees.md")
