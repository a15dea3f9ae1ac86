"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.errors import SpecError
from pipeline.utils.precision import Precision

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
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        help=(
            "Precision of products. bf16 is faster on devices with units for it; others compute in"
            " float32."
        )
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
PRESET_TRIALS = {"fast": 8, "good": 16, "best": 40}
Preset = Annotated[
    Literal["fast", "good", "best"] | None,
    typer.Option(
        help=(
            "How many configurations to try per task, good by default:"
            f" {', '.join(f'{name} {count}' for name, count in PRESET_TRIALS.items())}."
        )
    ),
]
Cpus = Annotated[
    float | None,
    typer.Option(
        "--cpus-per-trial",
        min=0.1,
        help="CPUs per rank of a trial. Default: its share of the node, or 1 without GPUs.",
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-trial",
        min=0,
        help=(
            "GPUs per rank, or a fraction of one. Default: 1 if there are any; trials of a run may"
            " share one, as a dry run finds."
        ),
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
            "Workers that select connections. Default: an equal share of the cluster, or one if"
            " that is faster."
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
TimeLimit = Annotated[
    str | None,
    typer.Option(
        help=(
            "Wall-clock limit for all tasks, such as 90s, 30m or 2h: trials are left out so that"
            " the fits still end in time."
        ),
        metavar="DURATION",
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


def overrides(
    recipe: Path | None,
    search: Path | None,
    max_bytes: str | None,
    trials: int | None,
    preset: str | None = None,
) -> dict[str, Any]:
    """The sections of a task that `--recipe`, `--search`, `--max-bytes`, `--trials` and `--preset`
    replace.

    Raises:
        SpecError: A file cannot be read as YAML, or both of the last two are given.
    """
    from pipeline.specs.yaml_files import read_mapping

    if preset is not None and trials is not None:
        raise SpecError(
            f"--preset {preset} tries {PRESET_TRIALS[preset]} configurations, --trials {trials}:"
            " give one of the two"
        )
    trials = trials if preset is None else PRESET_TRIALS[preset]
    sections: dict[str, Any] = {}
    if recipe is not None:
        sections["recipe"] = read_mapping(recipe)
    if search is not None:
        sections["search"] = read_mapping(search)
    if trials is not None:
        sections["search"] = {**sections.get("search", {}), "trials": trials}
    if max_bytes is not None:
        sections["budget"] = {"max_bytes": max_bytes}
    return sections


def time_limit_seconds(text: str | None) -> float | None:
    """The value of `--time-limit` in seconds.

    Raises:
        SpecError: It is not a positive duration.
    """
    from pipeline.utils.durations import parse_duration

    try:
        return None if text is None else parse_duration(text)
    except ValueError as error:
        raise SpecError(f"--time-limit: given {text!r}; {error}") from None


def size_of(option: str, text: str) -> int:
    """The bytes that an option gives as a text such as 32KiB. Raises SpecError."""
    from pipeline.specs import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise SpecError(f"{option}: given {text!r}; {error}") from None
