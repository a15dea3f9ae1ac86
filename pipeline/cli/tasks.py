"""The commands for tasks on this machine or its Ray cluster: plan, prepare and run them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipeline import api
from pipeline.cli.console import out, print_error, print_json
from pipeline.cli.options import (
    Address,
    AsJson,
    Cpus,
    Gpus,
    LogTrials,
    MaxBytes,
    Preset,
    Promote,
    Ranks,
    RecipeFile,
    RegistryPatience,
    SearchFile,
    SelectionWorkers,
    Tasks,
    TasksAtOnce,
    TimeLimit,
    Trials,
    Workdir,
    overrides,
    time_limit_seconds,
)
from pipeline.driver.retrying_registry import PATIENCE_SECONDS

if TYPE_CHECKING:
    from pipeline.driver.batch import TaskOutcome
    from pipeline.driver.plan_report import TaskPlan
    from pipeline.specs import Task

TaskFile = Annotated[Path, typer.Argument(help="Task file.")]


def run(
    tasks: Tasks,
    recipe: RecipeFile = None,
    search: SearchFile = None,
    max_bytes: MaxBytes = None,
    trials: Trials = None,
    preset: Preset = None,
    workdir: Workdir = api.WORKDIR,
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    ranks: Ranks = 1,
    selection_workers: SelectionWorkers = None,
    tasks_at_once: TasksAtOnce = None,
    time_limit: TimeLimit = None,
    registry_patience: RegistryPatience = PATIENCE_SECONDS,
    log_trials: LogTrials = True,
    promote: Promote = False,
    as_json: AsJson = False,
) -> None:
    """Run tasks to registered packs: prepare, select, search, fit, register.

    Interrupt it at any time; the same command continues.
    """
    from pipeline.specs.task_files import load_tasks

    seconds = time_limit_seconds(time_limit)
    loaded = load_tasks(tasks, overrides=overrides(recipe, search, max_bytes, trials, preset))
    options: dict[str, Any] = {
        "time_limit_seconds": seconds,
        "registry_patience_seconds": registry_patience,
        "log_trials": log_trials,
        "promote": promote,
        "per_trial": (cpus, gpus),
        "ranks_per_trial": ranks,
        "selection_workers": selection_workers,
        "tasks_at_once": tasks_at_once,
    }
    _run_tasks(loaded, workdir, address=address, as_json=as_json, **options)


def _run_tasks(
    tasks: Sequence[Task], workdir: Path, *, as_json: bool = False, **options: Any
) -> None:
    from pipeline.cli.progress import batch_progress

    names = [task.name for task in tasks]
    with batch_progress(names, workdir, as_json=as_json) as progress:
        outcomes = api.run(tasks, workdir=workdir, on_progress=progress.update, **options)
    if as_json:
        print_json([_outcome_as_json(outcome) for outcome in outcomes])
    else:
        _print_outcomes(outcomes)
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if errors:
        raise typer.Exit(errors[0].exit_code)


def _print_outcomes(outcomes: Sequence[TaskOutcome]) -> None:
    from pipeline.cli.tables import champions_table

    registered = [outcome for outcome in outcomes if outcome.error is None]
    if registered:
        out.print(champions_table(registered))
    for outcome in registered:
        assert outcome.registered is not None
        out.print(outcome.registered.remark, soft_wrap=True)
        out.print(f"front of {outcome.task}: {outcome.front_figure}", soft_wrap=True)
        for warning in outcome.warnings():
            out.print(f"warning: {outcome.task}: {warning}", soft_wrap=True)
    for outcome in outcomes:
        if outcome.error is not None:
            print_error(f"{outcome.task} failed in {outcome.stage}:", str(outcome.error))
    if len(outcomes) > len(registered) > 0:
        typer.echo(
            f"{len(registered)} of {len(outcomes)} tasks registered,"
            f" {len(outcomes) - len(registered)} failed",
            err=True,
        )
    if len(outcomes) > len(registered):
        typer.echo(
            "run the same command to try the failed tasks again; finished work is reused", err=True
        )


def _outcome_as_json(outcome: TaskOutcome) -> dict[str, Any]:
    return {
        "task": outcome.task,
        "registered": asdict(outcome.registered) if outcome.registered else None,
        "front_figure": outcome.front_figure,
        "stage": outcome.stage,
        "error": str(outcome.error) if outcome.error else None,
        "warnings": outcome.warnings(),
        "trials_left": outcome.trials_left,
        "trials": [trial.row() for trial in outcome.trials],
    }


def demo(
    workdir: Workdir = api.WORKDIR,
    max_bytes: MaxBytes = None,
    trials: Trials = None,
    preset: Preset = None,
    time_limit: TimeLimit = None,
) -> None:
    """Run the whole pipeline on three small embedded tasks, on this machine."""
    from pipeline.data import save_samples
    from pipeline.driver.workspace import Workspace
    from pipeline.specs.catalogue import catalogue_folder
    from pipeline.specs.task_files import load_tasks

    seconds = time_limit_seconds(time_limit)
    tasks = load_tasks(
        [catalogue_folder() / "demo"], overrides=overrides(None, None, max_bytes, trials, preset)
    )
    out.print(
        f"{len(tasks)} tasks on one frozen backbone: {', '.join(task.name for task in tasks)};"
        f" everything is kept in {workdir}/"
    )
    _run_tasks(tasks, workdir, time_limit_seconds=seconds)
    first = tasks[0].name
    image = save_samples(
        Workspace(workdir.resolve()).data(first), workdir / "samples" / first, count=4
    )[0]
    option = "" if workdir == api.WORKDIR else f" --workdir {workdir}"
    command = (
        sys.argv[0] if sys.argv[0].startswith(".") else "taskpack"
    )  # as it was called: make runs it from an environment that is not on the path
    out.print("\nTry next:")
    for line in (
        f"ls --max-bytes 6KiB{option}",
        f"show {first}@champion{option}",
        f"predict {first}@champion {image}{option}",
    ):
        out.print(f"  {command} {line}", soft_wrap=True, style="bold")


def plan(
    task: TaskFile,
    recipe: RecipeFile = None,
    search: SearchFile = None,
    max_bytes: MaxBytes = None,
    modules: Annotated[bool, typer.Option("--modules", help="Print one row per module.")] = False,
    select: Annotated[
        bool,
        typer.Option(
            "--select/--no-select",
            help="Select connections, which takes longest. Without it, sizes are bounds.",
        ),
    ] = True,
    workdir: Workdir = api.WORKDIR,
    as_json: AsJson = False,
) -> None:
    """Print what a recipe trains and the size of every configuration, without training."""
    from pipeline.cli.progress import PlanProgress
    from pipeline.cli.tables import about_table
    from pipeline.driver.plan_report import plan_task
    from pipeline.specs.task_files import load_task

    loaded = load_task(task, overrides=overrides(recipe, search, max_bytes, None))
    if loaded.about.model_fields_set and not as_json:
        # Before the data is needed: it says where to get it.
        out.print(about_table(loaded))
        out.print()
    with PlanProgress(Console(stderr=True)) as progress:
        planned = plan_task(loaded, workdir.resolve(), select=select, on_step=progress.step)
    if as_json:
        print_json({"about": loaded.about.model_dump(), **asdict(planned)})
    else:
        _print_plan(planned, loaded.budget.max_bytes, by_module=modules)


def _print_plan(planned: TaskPlan, max_bytes: int, *, by_module: bool) -> None:
    from pipeline.cli.tables import ledger_table, plan_table, space_table

    title = "Bytes" if planned.is_exact else "Bytes, with the cheapest positions possible"
    out.print(plan_table(planned.tensors, planned.subject, by_module=by_module))
    out.print()
    out.print(ledger_table(planned.ledger, title=title))
    out.print()
    if not planned.is_exact:
        out.print(
            "No connections are selected yet, and the size of their positions depends on them: the"
            " sizes are bounds.",
            soft_wrap=True,
        )
    out.print(space_table(planned.space, max_bytes))
    for remark in planned.remarks:
        out.print(f"note: {remark}", soft_wrap=True, markup=False, highlight=False)


def prepare(
    task: TaskFile,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for shards and index. Default: the task's folder in the work folder.",
        ),
    ] = None,
    workdir: Workdir = api.WORKDIR,
) -> None:
    """Write a task's data as WebDataset shards with an index, and check it."""
    from pipeline.cli.tables import table
    from pipeline.data import prepare as prepare_data
    from pipeline.data import remarks_on
    from pipeline.data.quoting import listing
    from pipeline.driver.workspace import Workspace
    from pipeline.specs.task_files import load_task
    from pipeline.utils.files import exclusive

    loaded = load_task(task)
    target = folder or Workspace(workdir.resolve()).data(loaded.name)
    with exclusive(workdir) if folder is None else contextlib.nullcontext():
        index = prepare_data(loaded, target)
    built = table("split", "samples", "shards", "bytes")
    for name, shards in index.splits.items():
        built.add_row(
            name,
            f"{sum(shard.samples for shard in shards):,}",
            str(len(shards)),
            f"{sum(shard.size_bytes for shard in shards):,}",
        )
    out.print(
        f"{target}: {len(index.classes)} classes ({listing(index.classes, most=20)}), digest"
        f" {index.digest[:16]}...",
        soft_wrap=True,
    )
    out.print(built)
    for remark in remarks_on(index):
        out.print(f"note: {remark}", soft_wrap=True, markup=False, highlight=False)
