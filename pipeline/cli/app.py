"""The command line: every command is a few calls into the package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from pipeline.cli import batches, packs, tasks
from pipeline.cli.compare import compare
from pipeline.cli.console import interruption_says, print_error
from pipeline.cli.serve import serve
from pipeline.errors import TaskpackError
from pipeline.utils.signals import interruptible


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run a command; an interruption ends any command with one line."""
        with interruption_says("run the same command to start again"):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="One frozen vision backbone, hundreds of tasks, a few kilobytes each.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {  # in the order of --help
    "run": tasks.run,
    "compare": compare,
    "submit": batches.submit,
    "status": batches.status,
    "logs": batches.logs,
    "stop": batches.stop,
    "demo": tasks.demo,
    "ls": packs.list_packs,
    "show": packs.show,
    "predict": packs.predict,
    "evaluate": packs.evaluate,
    "verify": packs.verify,
    "serve": serve,
    "export": packs.export,
    "import": packs.import_,
    "plan": tasks.plan,
    "prepare": tasks.prepare,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Entry point: a named error becomes one message and its exit code."""
    with interruptible():
        try:
            app()
        except TaskpackError as error:
            print_error("error:", str(error))
            sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
