"""The commands for batches on a cluster: submit one, ask for it, stop it."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.console import interruption_says, out, print_error, print_json
from pipeline.cli.options import (
    AsJson,
    Cpus,
    Gpus,
    MaxBytes,
    Preset,
    Promote,
    Ranks,
    RecipeFile,
    SearchFile,
    SelectionWorkers,
    Tasks,
    TasksAtOnce,
    TimeLimit,
    Trials,
    overrides,
    time_limit_seconds,
)
from pipeline.driver import jobs

JobsAddress = Annotated[
    str,
    typer.Option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        help="Jobs server of the cluster. Its token is read from RAY_AUTH_TOKEN.",
    ),
]
BatchId = Annotated[
    str, typer.Argument(help="Name of the batch, as printed by submit.", metavar="BATCH")
]


SharedWorkdir = Annotated[
    str,
    typer.Option(
        help="Folder for all results: an absolute path that all nodes of the cluster share."
    ),
]
NewBatchId = Annotated[
    str | None,
    typer.Option("--batch-id", help="Name of the batch. Default: a hash of tasks and options."),
]
SharedFolders = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder that the cluster sees at the same path as this machine.", metavar="FOLDER"
    ),
]
WorkingDir = Annotated[
    Path | None,
    typer.Option(help="Clone whose code is sent along. Default: the code in the cluster's image."),
]
Python = Annotated[
    str, typer.Option(help="Python interpreter of the cluster that has taskpack installed.")
]


def submit(
    tasks: Tasks,
    workdir: SharedWorkdir,
    address: JobsAddress = jobs.DEFAULT_ADDRESS,
    batch_id: NewBatchId = None,
    shared: SharedFolders = None,
    working_dir: WorkingDir = None,
    python: Python = "python",
    recipe: RecipeFile = None,
    search: SearchFile = None,
    max_bytes: MaxBytes = None,
    trials: Trials = None,
    preset: Preset = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    ranks: Ranks = 1,
    selection_workers: SelectionWorkers = None,
    tasks_at_once: TasksAtOnce = None,
    time_limit: TimeLimit = None,
    promote: Promote = False,
) -> None:
    """Run tasks on a Ray cluster, from outside it.

    A batch that is running or done is not started again; one that failed or was stopped resumes.
    """
    from pipeline.specs.task_files import load_tasks

    given = {
        "--cpus-per-trial": cpus,
        "--gpus-per-trial": gpus,
        "--ranks-per-trial": ranks if ranks > 1 else None,
        "--selection-workers": selection_workers,
        "--tasks-at-once": tasks_at_once,
        "--time-limit": time_limit_seconds(time_limit),
    }
    options = [
        text for name, value in given.items() if value is not None for text in (name, f"{value:g}")
    ]
    options += ["--promote"] if promote else []
    replaced = overrides(recipe, search, max_bytes, trials, preset)
    loaded = load_tasks(tasks, overrides=replaced, expand=False)
    batch = jobs.describe(loaded, workdir=workdir, options=options, shared=shared or [])
    server = jobs.JobServer(address)
    attempt, is_new = server.submit(batch, batch_id, working_dir=working_dir, python=python)
    out.print(_submission(attempt, is_new=is_new), soft_wrap=True)
    option = "" if address == jobs.DEFAULT_ADDRESS else f" --address {address}"
    out.print(f"taskpack logs {attempt.batch} --follow{option}", soft_wrap=True, style="bold")


def _submission(attempt: jobs.Attempt, *, is_new: bool) -> str:
    if is_new:
        tasks = f"{attempt.tasks} {'task' if attempt.tasks == 1 else 'tasks'}"
        return f"{attempt.batch}: {tasks} submitted, attempt {attempt.attempt}"
    state = "is already running" if attempt.is_active else "is already done"
    return f"{attempt.batch}: {state}, nothing was started"


def status(
    batch: Annotated[
        str | None, typer.Argument(help="Show the tasks of this batch only.", metavar="BATCH")
    ] = None,
    workdir: Annotated[
        Path | None,
        typer.Option(
            help="Show the tasks of the run in this work folder, without asking a cluster."
        ),
    ] = None,
    address: JobsAddress = jobs.DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """List the batches of a cluster, newest first, or show the tasks of one batch.

    Give BATCH for a batch on the cluster, or --workdir for a run on this machine.
    """
    if workdir is not None:
        _status_of_run(workdir, batch, as_json)
    elif batch is not None:
        _status_of_batch(jobs.JobServer(address), batch, as_json)
    else:
        _status_of_cluster(jobs.JobServer(address), as_json)


def _status_of_cluster(server: jobs.JobServer, as_json: bool) -> None:
    from pipeline.cli.tables import attempts_table

    attempts = server.attempts()
    if as_json:
        print_json([asdict(attempt) for attempt in attempts])
    elif attempts:
        out.print(attempts_table(attempts))
    else:
        out.print("no batch has been submitted to this cluster since it was started")


def _status_of_batch(server: jobs.JobServer, batch: str, as_json: bool) -> None:
    from pipeline.cli.tables import attempts_table

    last = server.find(batch)
    attempts = [attempt for attempt in server.attempts() if attempt.batch == batch]
    progress = server.progress(last)
    if as_json:
        shown = {last.job: progress.as_json() if progress is not None else None}
        print_json(
            [{**asdict(attempt), "progress": shown.get(attempt.job)} for attempt in attempts]
        )
        return
    out.print(attempts_table(attempts))
    if last.message:
        out.print(last.message, soft_wrap=True)
    if progress is not None:
        _print_progress(progress, is_running=last.is_active)


def _status_of_run(workdir: Path, batch: str | None, as_json: bool) -> None:
    from pipeline.driver.monitor.state import read_state
    from pipeline.errors import SpecError, StorageError

    if batch is not None:
        raise SpecError(
            f"BATCH: given {batch!r} together with --workdir; give BATCH for a batch on a cluster,"
            " or --workdir for a local run"
        )
    progress = read_state(workdir)
    if progress is None:
        raise StorageError(
            f"--workdir: {workdir} has no state of a run; give the work folder of a `taskpack run`"
            " that has started"
        )
    if as_json:
        print_json(progress.as_json())
    else:
        _print_progress(
            progress, is_running=not progress.is_over, age_seconds=time.time() - progress.written
        )


def _print_progress(progress: Any, *, is_running: bool, age_seconds: float | None = None) -> None:
    from pipeline.cli.status_table import state_table, summary

    out.print(state_table(progress, is_running=is_running))
    for task in progress.tasks:
        if task.stage == "failed":
            print_error(f"{task.task}:", task.remark)
    out.print(summary(progress, is_running=is_running, age_seconds=age_seconds), soft_wrap=True)


def logs(
    batch: BatchId,
    follow: Annotated[bool, typer.Option("--follow", help="Follow until the batch ends.")] = False,
    address: JobsAddress = jobs.DEFAULT_ADDRESS,
) -> None:
    """Print the output of the last attempt of a batch."""
    from pipeline.errors import ClusterError

    server = jobs.JobServer(address)
    if not follow:
        typer.echo(server.logs(batch), nl=False)
        return
    with interruption_says(f"the batch continues; `taskpack stop {batch}` ends it"):
        ended = server.follow(batch, lambda text: typer.echo(text, nl=False))
    if ended.is_active:
        raise ClusterError(
            f"{batch}: the logs ended, but the batch continues; run the same command to follow it"
            " again"
        )
    if ended.state != jobs.SUCCEEDED:
        raise ClusterError(
            f"{batch}: {ended.state.lower()}."
            f" {ended.message.splitlines()[0] if ended.message else ''}; submit it again to resume"
        )


def stop(batch: BatchId, address: JobsAddress = jobs.DEFAULT_ADDRESS) -> None:
    """Stop a batch on a cluster. Finished work is kept; submit the batch again to resume."""
    attempt, was_running = jobs.JobServer(address).stop(batch)
    out.print(
        f"{batch}: {'stopped' if was_running else 'was not running'} ({attempt.state})",
        soft_wrap=True,
    )
