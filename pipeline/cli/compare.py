"""The command that compares methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import api
from pipeline.cli.console import out, print_error, print_json
from pipeline.cli.options import (
    Address,
    AsJson,
    Cpus,
    Gpus,
    Ranks,
    TasksAtOnce,
    TimeLimit,
    Workdir,
    time_limit_seconds,
)

if TYPE_CHECKING:
    from pipeline.reports.comparison_row import Comparison

TasksIfAny = Annotated[
    list[Path] | None,
    typer.Argument(help="Task files, or folders of task files.", metavar="TASK.yaml..."),
]
SuiteName = Annotated[
    str | None,
    typer.Option(
        help="Suite of tasks, such as vtab1k, instead of task files. Its averages are reported."
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated methods: names from the catalogue, or YAML files. Default: all."
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Fits per method.")]
Fraction = Annotated[
    float,
    typer.Option(help="Fraction of each method's search space to try, above 0 and at most 1."),
]
Reference = Annotated[
    str | None,
    typer.Option(help="Method that BD-rates are relative to. Default: the first."),
]
Epochs = Annotated[
    int | None,
    typer.Option(min=1, help="Epochs of every trial and fit. Default: those of the task."),
]
Folder = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for tables and figures. Default: inside the work folder."),
]


def compare(
    tasks: TasksIfAny = None,
    suite: SuiteName = None,
    methods: Methods = None,
    seeds: Seeds = 3,
    fraction: Fraction = 1.0,
    reference: Reference = None,
    epochs: Epochs = None,
    folder: Folder = None,
    workdir: Workdir = api.WORKDIR,
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    ranks: Ranks = 1,
    tasks_at_once: TasksAtOnce = None,
    time_limit: TimeLimit = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods under one protocol.

    Each method is tuned on validation over the same fraction of its search space and tested once
    per seed. Interrupt it at any time; the same command continues.
    """
    from pipeline.cli.progress import batch_progress
    from pipeline.driver.compare import compare_methods
    from pipeline.driver.stages import Placement
    from pipeline.reports.comparison import write_comparison
    from pipeline.specs.catalogue import known_methods, load_methods, tasks_to_compare

    chosen = load_methods(known_methods() if methods is None else _split(methods))
    found, loaded = tasks_to_compare(tasks or [], suite, epochs)
    with batch_progress([task.name for task in loaded], workdir, as_json=as_json) as progress:
        rows = compare_methods(
            loaded,
            chosen,
            workdir,
            seeds=seeds,
            fraction=fraction,
            reference=reference,
            address=address,
            placement=Placement((cpus, gpus), ranks, tasks_at_once=tasks_at_once),
            time_limit_seconds=time_limit_seconds(time_limit),
            on_progress=progress.update,
        )
    notes = _notes(fraction, seeds, reference or next(iter(chosen)))
    written = write_comparison(rows, folder or workdir / "comparison", suite=found, notes=notes)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        _print_comparison(rows, [task.name for task in loaded], written)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def _notes(fraction: float, seeds: int, reference: str) -> str:
    return (
        f"Tuned over {fraction:.4g} of each method's search space; {seeds} fits per method."
        f" BD-rate: bytes relative to {reference} at equal validation metric, between the fronts of"
        " all trials, ± standard error."
    )


def _print_comparison(
    rows: Sequence[Comparison], task_names: Sequence[str], written: Sequence[Path]
) -> None:
    from pipeline.cli.tables import comparison_table

    for name in task_names:
        out.print(comparison_table([row for row in rows if row.task == name], title=name))
    for row in rows:
        if row.warning:
            out.print(f"warning: {row.task}, {row.method}: {row.warning}", soft_wrap=True)
        if row.error:
            print_error(f"{row.task}, {row.method}:", row.error)
    for path in written:
        out.print(str(path), soft_wrap=True)
