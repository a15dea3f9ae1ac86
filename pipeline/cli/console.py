"""What the commands print with: standard output, JSON, error lines, a line on interruption."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from pipeline.utils.signals import Terminated, exit_code

out = Console(markup=False, highlight=False, emoji=False)


def print_json(content: Any) -> None:
    """Print plain data as indented JSON."""
    typer.echo(json.dumps(content, indent=2, default=str))


def print_error(title: str, message: str) -> None:
    """Print one line to standard error, with its title in red."""
    Console(stderr=True, soft_wrap=True).print(Text.assemble((title, "bold red"), " ", message))


@contextlib.contextmanager
def interruption_says(remark: str) -> Iterator[None]:
    """End the command on Ctrl-C or SIGTERM with one line and the exit code of the signal."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        print_error(
            "terminated;" if isinstance(interruption, Terminated) else "interrupted;", remark
        )
        raise typer.Exit(exit_code(interruption)) from None
