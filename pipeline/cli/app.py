"""The command line: every command is a few calls into the package."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from pipeline import api
from pipeline.driver import jobs
from pipeline.driver.registrar import PATIENCE_SECONDS
from pipeline.errors import TaskpackError
from pipeline.utils.signals import Terminated, exit_code, interruptible


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run a command; an interruption ends any command with one line."""
        with _interruption_says("run the same command to start again"):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="One frozen vision backbone, hundreds of tasks, a few kilobytes each.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console(markup=False, highlight=False, emoji=False)

Tasks = Annotated[
    list[Path], typer.Argument(help="Task files, or folders of task files.", metavar="TASK.yaml...")
]
Reference = Annotated[
    str,
    typer.Argument(
        help="NAME, NAME@ALIAS or NAME/VERSION in the registry, or a pack file.", metavar="PACK"
    ),
]
Workdir = Annotated[
    Path,
    typer.Option(
        help="Folder for all results. Its registry is used if MLFLOW_TRACKING_URI is not set."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BackboneFile = Annotated[
    Path | None,
    typer.Option(
        "--backbone", help="Checkpoint of the pack's backbone, if this machine does not know it."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device to compute on, such as cpu or cuda:1. Default: the GPU if there is one."
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file that replaces the recipe of the tasks.")
]
SearchFile = Annotated[
    Path | None,
    typer.Option("--search", help="YAML file that overrides keys of the tasks' search space."),
]
MaxBytes = Annotated[str | None, typer.Option(help="Largest size of a pack, such as 32KiB.")]
Trials = Annotated[int | None, typer.Option(min=1, help="Configurations to try per task.")]
Cpus = Annotated[
    float | None,
    typer.Option("--cpus-per-trial", min=0.1, help="CPUs per rank of a trial. Default: 1."),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-trial",
        min=0,
        help="GPUs per rank, or a fraction of one. Default: 1 if there are any.",
    ),
]
Ranks = Annotated[
    int,
    typer.Option(
        "--ranks-per-trial",
        min=1,
        help="Processes that train each trial and fit together, for large tasks.",
    ),
]
SelectionWorkers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=(
            "Workers that select connections. Default: an equal share of the cluster, or none if"
            " this process is faster."
        ),
    ),
]
TasksAtOnce = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=(
            "Tasks to run concurrently. Default: one more than the number whose trials fill the"
            " cluster."
        ),
    ),
]
RegistryPatience = Annotated[
    float,
    typer.Option(
        "--registry-patience",
        min=0,
        help="Seconds to wait for an unreachable MLflow server at the end of the run.",
    ),
]
LogTrials = Annotated[
    bool,
    typer.Option("--log-trials/--no-log-trials", help="Log each trial as a child run in MLflow."),
]
Promote = Annotated[
    bool,
    typer.Option(
        "--promote",
        help="Give the alias champion to the new packs even if an earlier one is better.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help=(
            "Ray cluster to use (auto: the one of this machine). Default: a private one on this"
            " machine."
        )
    ),
]
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


def main() -> None:
    """Entry point: a named error becomes one message and its exit code."""
    with interruptible():
        try:
            app()
        except TaskpackError as error:
            _print_error("error:", str(error))
            sys.exit(error.exit_code)


@contextlib.contextmanager
def _interruption_says(remark: str) -> Iterator[None]:
    """End the command on Ctrl-C or SIGTERM with one line and the exit code of the signal."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        _print_error(
            "terminated;" if isinstance(interruption, Terminated) else "interrupted;", remark
        )
        raise typer.Exit(exit_code(interruption)) from None


def _kept(workdir: Path) -> str:
    return f"finished work is kept in {workdir}; run the same command to continue"


def _print_error(title: str, message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text.assemble((title, "bold red"), " ", message))


def _overrides(
    recipe: Path | None, search: Path | None, max_bytes: str | None, trials: int | None
) -> dict[str, Any]:
    from pipeline.specs.task_files import read_mapping

    overrides: dict[str, Any] = {}
    if recipe is not None:
        overrides["recipe"] = read_mapping(recipe)
    if search is not None:
        overrides["search"] = read_mapping(search)
    if trials is not None:
        overrides["search"] = {**overrides.get("search", {}), "trials": trials}
    if max_bytes is not None:
        overrides["budget"] = {"max_bytes": max_bytes}
    return overrides


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, default=str))


@app.command()
def run(
    tasks: Tasks,
    recipe: RecipeFile = None,
    search: SearchFile = None,
    max_bytes: MaxBytes = None,
    trials: Trials = None,
    workdir: Workdir = api.WORKDIR,
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    ranks: Ranks = 1,
    selection_workers: SelectionWorkers = None,
    tasks_at_once: TasksAtOnce = None,
    registry_patience: RegistryPatience = PATIENCE_SECONDS,
    log_trials: LogTrials = True,
    promote: Promote = False,
    as_json: AsJson = False,
) -> None:
    """Run tasks to registered packs: prepare, select, search, fit, register.

    Interrupt it at any time; the same command continues.
    """
    from pipeline.specs.task_files import load_tasks

    loaded = load_tasks(tasks, overrides=_overrides(recipe, search, max_bytes, trials))
    options: dict[str, Any] = {
        "registry_patience_seconds": registry_patience,
        "log_trials": log_trials,
        "promote": promote,
        "per_trial": (cpus, gpus),
        "ranks_per_trial": ranks,
        "selection_workers": selection_workers,
        "tasks_at_once": tasks_at_once,
    }
    _run_tasks(loaded, workdir, address=address, as_json=as_json, **options)


def _run_tasks(tasks: list[Any], workdir: Path, *, as_json: bool = False, **options: Any) -> None:
    from pipeline.cli.progress import BatchProgress

    console = Console(stderr=True) if as_json else out
    with (
        _interruption_says(_kept(workdir)),
        BatchProgress(console, [task.name for task in tasks]) as progress,
    ):
        outcomes = api.run(tasks, workdir=workdir, on_progress=progress.update, **options)
    if as_json:
        _print_json([_outcome_as_json(outcome) for outcome in outcomes])
    else:
        _print_outcomes(outcomes)
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if errors:
        raise typer.Exit(errors[0].exit_code)


def _print_outcomes(outcomes: list[Any]) -> None:
    from pipeline.cli.tables import champions_table

    registered = [outcome for outcome in outcomes if outcome.error is None]
    if registered:
        out.print(champions_table(registered))
    for outcome in registered:
        out.print(outcome.registered.remark, soft_wrap=True)
        out.print(f"front of {outcome.task}: {outcome.front_figure}", soft_wrap=True)
        for warning in outcome.warnings():
            out.print(f"warning: {outcome.task}: {warning}", soft_wrap=True)
    for outcome in outcomes:
        if outcome.error is not None:
            _print_error(f"{outcome.task} failed in {outcome.stage}:", str(outcome.error))
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


def _outcome_as_json(outcome: Any) -> dict[str, Any]:
    return {
        "task": outcome.task,
        "registered": asdict(outcome.registered) if outcome.registered else None,
        "front_figure": outcome.front_figure,
        "stage": outcome.stage,
        "error": str(outcome.error) if outcome.error else None,
        "warnings": outcome.warnings(),
        "trials": [trial.row() for trial in outcome.trials],
    }


@app.command()
def compare(
    tasks: Annotated[
        list[Path] | None,
        typer.Argument(help="Task files, or folders of task files.", metavar="TASK.yaml..."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Suite of tasks, such as vtab1k, instead of task files. Its averages are reported."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated methods: names from the catalogue, or YAML files. Default: all."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fits per method.")] = 3,
    fraction: Annotated[
        float,
        typer.Option(help="Fraction of each method's search space to try, above 0 and at most 1."),
    ] = 1.0,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Epochs of every trial and fit. Default: those of the task."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for tables and figures. Default: inside the work folder."
        ),
    ] = None,
    workdir: Workdir = api.WORKDIR,
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    ranks: Ranks = 1,
    tasks_at_once: TasksAtOnce = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods under one protocol.

    Each method is tuned on validation over the same fraction of its search space and tested once
    per seed. Interrupt it at any time; the same command continues.
    """
    from pipeline.cli.progress import BatchProgress
    from pipeline.cli.tables import comparison_table
    from pipeline.driver.compare import compare_methods
    from pipeline.driver.stages import Placement
    from pipeline.reports.comparison import write_comparison
    from pipeline.specs.task_files import known_methods, load_methods, tasks_to_compare

    chosen = load_methods(
        known_methods() if methods is None else [name.strip() for name in methods.split(",")]
    )
    found, loaded = tasks_to_compare(tasks or [], suite, epochs)
    console = Console(stderr=True) if as_json else out
    with (
        _interruption_says(_kept(workdir)),
        BatchProgress(console, [task.name for task in loaded]) as progress,
    ):
        placement = Placement(
            per_trial=(cpus, gpus), ranks_per_trial=ranks, tasks_at_once=tasks_at_once
        )
        rows = compare_methods(
            loaded,
            chosen,
            workdir,
            seeds=seeds,
            fraction=fraction,
            address=address,
            placement=placement,
            on_progress=progress.update,
        )
    notes = f"Tuned over {fraction:.4g} of each method's search space; {seeds} fits per method."
    written = write_comparison(rows, folder or workdir / "comparison", suite=found, notes=notes)
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    for task in loaded:
        out.print(comparison_table([row for row in rows if row.task == task.name], title=task.name))
    for row in rows:
        if row.warning:
            out.print(f"warning: {row.task}, {row.method}: {row.warning}", soft_wrap=True)
        if row.error:
            _print_error(f"{row.task}, {row.method}:", row.error)
    for path in written:
        out.print(str(path), soft_wrap=True)


@app.command()
def submit(
    tasks: Tasks,
    workdir: Annotated[
        str,
        typer.Option(
            help="Folder for all results: an absolute path that all nodes of the cluster share."
        ),
    ],
    address: JobsAddress = jobs.DEFAULT_ADDRESS,
    batch_id: Annotated[
        str | None, typer.Option(help="Name of the batch. Default: a hash of tasks and options.")
    ] = None,
    shared: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder that the cluster sees at the same path as this machine.", metavar="FOLDER"
        ),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            help="Clone whose code is sent along. Default: the code in the cluster's image."
        ),
    ] = None,
    python: Annotated[
        str, typer.Option(help="Python interpreter of the cluster that has taskpack installed.")
    ] = "python",
    recipe: RecipeFile = None,
    search: SearchFile = None,
    max_bytes: MaxBytes = None,
    trials: Trials = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    ranks: Ranks = 1,
    selection_workers: SelectionWorkers = None,
    tasks_at_once: TasksAtOnce = None,
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
    }
    options = [
        text for name, value in given.items() if value is not None for text in (name, f"{value:g}")
    ]
    options += ["--promote"] if promote else []
    loaded = load_tasks(
        tasks, overrides=_overrides(recipe, search, max_bytes, trials), expand=False
    )
    batch = jobs.describe(loaded, workdir=workdir, options=options, shared=shared or [])
    attempt, is_new = jobs.JobServer(address).submit(
        batch, batch_id, working_dir=working_dir, python=python
    )
    if not is_new:
        out.print(
            f"{attempt.batch}: {'is already running' if attempt.is_active else 'is already done'},"
            " nothing was started",
            soft_wrap=True,
        )
    else:
        out.print(
            f"{attempt.batch}: {attempt.tasks} {'task' if attempt.tasks == 1 else 'tasks'}"
            f" submitted, attempt {attempt.attempt}",
            soft_wrap=True,
        )
    option = "" if address == jobs.DEFAULT_ADDRESS else f" --address {address}"
    out.print(f"taskpack logs {attempt.batch} --follow{option}", soft_wrap=True, style="bold")


@app.command()
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
        _print_json([asdict(attempt) for attempt in attempts])
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
        _print_json(
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
        _print_json(progress.as_json())
    else:
        _print_progress(
            progress, is_running=not progress.is_over, age_seconds=time.time() - progress.written
        )


def _print_progress(progress: Any, *, is_running: bool, age_seconds: float | None = None) -> None:
    from pipeline.cli.status_table import state_table, summary

    out.print(state_table(progress, is_running=is_running))
    for task in progress.tasks:
        if task.stage == "failed":
            _print_error(f"{task.task}:", task.remark)
    out.print(summary(progress, is_running=is_running, age_seconds=age_seconds), soft_wrap=True)


@app.command()
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
    with _interruption_says(f"the batch continues; `taskpack stop {batch}` ends it"):
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


@app.command()
def stop(batch: BatchId, address: JobsAddress = jobs.DEFAULT_ADDRESS) -> None:
    """Stop a batch on a cluster. Finished work is kept; submit the batch again to resume."""
    attempt, was_running = jobs.JobServer(address).stop(batch)
    out.print(
        f"{batch}: {'stopped' if was_running else 'was not running'} ({attempt.state})",
        soft_wrap=True,
    )


@app.command()
def demo(workdir: Workdir = api.WORKDIR, max_bytes: MaxBytes = None, trials: Trials = None) -> None:
    """Run the whole pipeline on three small embedded tasks, on this machine."""
    from pipeline.data import save_samples
    from pipeline.driver.workspace import Workspace
    from pipeline.specs.task_files import catalogue_folder, load_tasks

    tasks = load_tasks(
        [catalogue_folder() / "demo"], overrides=_overrides(None, None, max_bytes, trials)
    )
    out.print(
        f"{len(tasks)} tasks on one frozen backbone: {', '.join(task.name for task in tasks)};"
        f" everything is kept in {workdir}/"
    )
    _run_tasks(tasks, workdir)
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
        f"ls --max-bytes 48KiB{option}",
        f"show {first}@champion{option}",
        f"predict {first}@champion {image}{option}",
    ):
        out.print(f"  {command} {line}", soft_wrap=True, style="bold")


@app.command(name="ls")
def list_packs(
    task: Annotated[str | None, typer.Option(help="Only this task's packs.")] = None,
    max_bytes: MaxBytes = None,
    min_metric: Annotated[
        float | None, typer.Option(help="Smallest test metric, in [0, 1].", min=0, max=1)
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Only packs chosen by this metric, such as accuracy or mAP.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of rows.")] = 50,
    after: Annotated[
        str | None,
        typer.Option(
            help="Start after this pack, the last one of the previous page.", metavar="NAME/VERSION"
        ),
    ] = None,
    workdir: Workdir = api.WORKDIR,
    as_json: AsJson = False,
) -> None:
    """List packs of the registry by size and metric, best first."""
    from pipeline.cli.tables import packs_table

    found = api.find(
        task,
        max_bytes=_size(max_bytes),
        min_metric=min_metric,
        metric=metric,
        limit=limit + 1,
        after=after,
        workdir=workdir,
    )
    packs = found[:limit]
    if as_json:
        _print_json([asdict(pack) for pack in packs])
    elif packs:
        out.print(packs_table(packs))
    else:
        out.print("no pack matches")
    if len(found) > limit:
        typer.echo(
            f"there are more: continue with --after {packs[-1].name}/{packs[-1].version}", err=True
        )


def _size(text: str | None) -> int | None:
    from pipeline.errors import SpecError
    from pipeline.specs import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise SpecError(f"--max-bytes: given {text!r}; {error}") from None


@app.command()
def show(reference: Reference, workdir: Workdir = api.WORKDIR, as_json: AsJson = False) -> None:
    """Show a registered pack: its numbers, its bytes by part, and the trials of its study."""
    from pipeline.cli.tables import ledger_table, percent_with_error, table, trials_table
    from pipeline.packs import LEDGER_KEYS
    from pipeline.registry.store import open_registry

    registry = open_registry(None, workdir.resolve())
    pack = registry.get(reference)
    trials = registry.front(pack)
    if as_json:
        _print_json({**asdict(pack), "trials": trials})
        return
    facts = table("", "", numbers_from=9)
    facts.add_row("pack", f"{pack.name}/{pack.version}  {', '.join(pack.aliases)}")
    for label, text in (
        ("task", pack.tags.get("description") or pack.task),
        ("test %", f"{pack.metric} {percent_with_error(pack.metrics)}"),
        (
            "size",
            f"{pack.size_bytes:,} bytes, {pack.metrics['trained_values']:,.0f} trained values",
        ),
        ("backbone", f"{pack.tags['backbone']}  {pack.tags['backbone_fingerprint'][:16]}..."),
        (
            "made on",
            (
                f"{pack.tags['device']}: search {pack.metrics['search_seconds']:.0f} s, fit"
                f" {pack.metrics['fit_seconds']:.0f} s"
            ),
        ),
        ("digest", pack.pack_digest),
        ("recipe", "  ".join(f"{key}={value}" for key, value in sorted(pack.params.items()))),
    ):
        facts.add_row(label, text)
    facts.show_header = False
    out.print(facts)
    out.print()
    out.print(
        ledger_table({part: int(pack.metrics.get(f"bytes_{part}", 0)) for part in LEDGER_KEYS})
    )
    out.print()
    out.print(trials_table(trials, pack.tags.get("trial")))


@app.command()
def predict(
    reference: Reference,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    backbone: BackboneFile = None,
    device: Device = None,
    workdir: Workdir = api.WORKDIR,
    as_json: AsJson = False,
) -> None:
    """What a pack says of images: their class, or their labels."""
    from pipeline.cli.tables import predictions_table

    predictor = api.load(reference, backbone=backbone, device=device, workdir=workdir)
    rows = [
        {"image": str(image), **row}
        for image, row in zip(images, predictor.predict(images), strict=True)
    ]
    if as_json:
        _print_json(rows)
        return
    out.print(predictions_table(rows))


@app.command()
def evaluate(
    reference: Reference,
    task: Annotated[
        Path | None,
        typer.Option(help="Task file, if the data was not prepared in this work folder."),
    ] = None,
    backbone: BackboneFile = None,
    device: Device = None,
    workdir: Workdir = api.WORKDIR,
    as_json: AsJson = False,
) -> None:
    """Measure a pack on the test set of its task again."""
    from pipeline.driver.evaluation import evaluate_pack

    score, registered = evaluate_pack(
        reference, workdir=workdir, task_file=task, weights=backbone, device=device
    )
    content = {
        "metric": score.metric,
        "test_metric": score.value,
        "test_metric_stderr": score.standard_error,
        "samples": score.samples,
        "registered_test_metric": registered,
    }
    if as_json:
        _print_json(content)
        return
    out.print(
        f"test {score.metric} {score.value!r} of {score.samples} samples, standard error"
        f" {score.standard_error:.4f}"
    )
    if registered is not None:
        out.print(
            f"registered {registered!r}:"
            f" {'the same' if registered == score.value else 'NOT the same'}"
        )


@app.command()
def verify(
    reference: Reference, backbone: BackboneFile = None, workdir: Workdir = api.WORKDIR
) -> None:
    """Check that a pack is undamaged, fits its backbone, and computes the same as when written."""
    from pipeline.cli.tables import ledger_table
    from pipeline.packs import content_digest, ledger, read_pack

    path = api.fetch(reference, workdir=workdir)
    predictor = api.load(path, backbone=backbone, workdir=workdir)
    out.print(
        f"{reference}: valid. Digest, layout, backbone fingerprint and probe logits agree",
        soft_wrap=True,
    )
    out.print(
        f"task {predictor.metadata.task}, {len(predictor.metadata.classes)} classes, backbone"
        f" {predictor.metadata.backbone['model']}"
    )
    out.print(f"digest to sign {content_digest(path.read_bytes())}", soft_wrap=True)
    out.print(ledger_table(ledger(read_pack(path))))


@app.command()
def export(
    reference: Reference,
    to: Annotated[api.Format, typer.Option("--to", help="Format to export to.")],
    path: Annotated[
        Path,
        typer.Option(
            "--out",
            help="File (onnx, binary-adapter) or folder (timm, peft) to write; must not exist.",
        ),
    ],
    backbone: BackboneFile = None,
    workdir: Workdir = api.WORKDIR,
) -> None:
    """Write a pack in another project's format: a merged timm checkpoint, ONNX, a PEFT adapter,
    Binary Adapter's file.
    """
    difference = api.export(reference, to=to, path=path, backbone=backbone, workdir=workdir)
    size_bytes = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    out.print(f"{path}: {size_bytes:,} bytes", soft_wrap=True)
    if difference is not None:
        out.print(f"checked: its logits differ from the pack's by at most {difference:.1e}")


@app.command(name="import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="NAME.bin of Binary Adapter, with NAME.yaml next to it.", metavar="FILE"
        ),
    ],
    path: Annotated[Path, typer.Option("--out", help="Pack to write; must not exist.")],
    backbone: Annotated[
        Path | None,
        typer.Option("--backbone", help="Checkpoint of ViT-B/16 (orig_in21k). Default: timm's."),
    ] = None,
) -> None:
    """Import a file that Binary Adapter's authors published as a pack."""
    out.print(
        f"{path}: {api.import_pack(source, path=path, backbone=backbone):,} bytes", soft_wrap=True
    )


@app.command()
def plan(
    task: Annotated[Path, typer.Argument(help="Task file.")],
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
    from pipeline.cli.tables import about_table, ledger_table, plan_table, space_table
    from pipeline.driver.plan_report import plan_task
    from pipeline.specs.task_files import load_task

    loaded = load_task(task, overrides=_overrides(recipe, search, max_bytes, None))
    if (
        loaded.about.model_fields_set and not as_json
    ):  # before the data is needed: it says where to get it
        out.print(about_table(loaded))
        out.print()
    with PlanProgress(Console(stderr=True)) as progress:
        planned = plan_task(loaded, workdir.resolve(), select=select, on_step=progress.step)
    if as_json:
        _print_json(
            {
                "about": loaded.about.model_dump(),
                "tensors": [asdict(tensor) for tensor in planned.tensors],
                "ledger": planned.ledger,
                "space": planned.space,
                "is_exact": planned.is_exact,
                "remarks": planned.remarks,
            }
        )
        return
    out.print(plan_table(planned.tensors, by_module=modules))
    out.print()
    out.print(
        ledger_table(
            planned.ledger,
            title="Bytes" if planned.is_exact else "Bytes, with the cheapest positions possible",
        )
    )
    out.print()
    if not planned.is_exact:
        out.print(
            "No connections are selected yet, and the size of their positions depends on them: the"
            " sizes are bounds.",
            soft_wrap=True,
        )
    out.print(space_table(planned.space, loaded.budget.max_bytes))
    for remark in planned.remarks:
        out.print(f"note: {remark}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def prepare(
    task: Annotated[Path, typer.Argument(help="Task file.")],
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


if __name__ == "__main__":
    main()
