"""What benchmarks of many independent runs share: their options, and measuring several runs at the
same time, each of which is kept as soon as it ends.

A run is a dictionary that names what is measured (task, seed, epochs and a variant); its figures
are added to it. Interrupt a benchmark and start it again: what has been measured is not measured
again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from pipeline.adaptation import AdaptedModel
from pipeline.specs import Recipe
from pipeline.training import Inputs, train_epochs
from pipeline.training.fit import FitResult

SHARED = Path(__file__).parent.parent.parent / "shared"
Run = dict[str, Any]


def accuracy_of(runs: Sequence[Run]) -> tuple[float, float]:
    """The share of right test answers over all seeds, and its standard error for one."""
    right, samples = (sum(run[key] for run in runs) for key in ("correct", "samples"))
    share = right / samples
    return share, math.sqrt(share * (1 - share) / runs[0]["samples"])


@dataclass(frozen=True)
class Place:
    """Where runs read, write and compute."""

    shared: Path
    workdir: Path
    device: str


def parse_arguments(
    description: str | None,
    tasks: Sequence[str],
    variant: str,
    variants: Collection[str],
    seeds: Sequence[int],
    counts: Mapping[str, int] | None = None,
) -> argparse.Namespace:
    """The options of such a benchmark; `variant` names what differs between runs of a task, and
    `counts` are further settings of all runs, with their defaults.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks)
    parser.add_argument(f"--{variant}s", nargs="+", default=list(variants), choices=variants)
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--epochs", type=int, default=8)
    for name, default in (counts or {}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of data and backbones")
    parser.add_argument(
        "--workdir", type=Path, default=Path(__file__).parent.parent / "runs" / "fidelity"
    )
    parser.add_argument("--page", action="store_true", help="write the page from what is there")
    parser.set_defaults(settings=("epochs", *(counts or {})))
    return parser.parse_args()


def measure_missing(
    results: Path,
    arguments: argparse.Namespace,
    variant: str,
    select: Callable[[Sequence[Run], Place], None],
    measure: Callable[[Run, Place], Run],
) -> list[Run]:
    """Measure what was asked for and is not in the file `results`, and add it there; all its runs.

    Args:
        select: makes the selections of all runs first, so that no two runs make the same.
        measure: one run with its figures; it is called in another process.
    """
    result = json.loads(results.read_text()) if results.exists() else {"runs": []}
    asked = itertools.product(arguments.seeds, arguments.tasks, getattr(arguments, f"{variant}s"))
    settings = {name: getattr(arguments, name) for name in arguments.settings}
    runs = [
        {"task": task, variant: name, "seed": seed, **settings}
        for seed, task, name in asked
        if not arguments.page
    ]
    runs = [run for run in runs if not any(run.items() <= done.items() for done in result["runs"])]
    place, origin = (
        Place(arguments.shared.resolve(), arguments.workdir, arguments.device),
        _origin(),
    )
    select(runs, place)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        arguments.workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for done in as_completed([pool.submit(measure, run, place) for run in runs]):
            result["runs"].append({**done.result(), "origin": origin})
            results.write_text(json.dumps(result, indent=1) + "\n")
            print(result["runs"][-1], flush=True)
    return list(result["runs"])


def with_seed(inputs: Inputs, seed: int) -> Inputs:
    """The task with another seed for training; its splits stay as they are."""
    return replace(inputs, task=inputs.task.model_copy(update={"seed": seed}))


def train(
    model: AdaptedModel, inputs: Inputs, recipe: Recipe, seed: int, device: str = "cpu"
) -> list[float]:
    """Train a model on the training samples, as a trial does; the mean loss of each epoch."""
    epochs = train_epochs(
        model,
        inputs.reader("train"),
        inputs.splits["train"],
        recipe.training,
        inputs.kind,
        seed=seed,
        flip=inputs.task.input.flip,
        device=device,
    )
    return list(epochs)


def percent(run: Run) -> float:
    """The test accuracy of a run."""
    return 100.0 * run["correct"] / run["samples"]


def paired(runs: Sequence[Run], variant: str, other: str) -> list[tuple[Run, Run]]:
    """The runs of a variant, each with that of another variant on the same task, seed and settings,
    as far as there is one.
    """

    def key(run: Run) -> tuple[Any, ...]:
        return tuple(run.get(name) for name in ("task", "seed", "epochs", "limit"))

    others = {key(run): run for run in runs if run["variant"] == other}
    own = [run for run in runs if run["variant"] == variant]
    return [(run, others[key(run)]) for run in own if key(run) in others]


def points_of(pairs: Sequence[tuple[Run, Run]]) -> list[float]:
    """Points of test accuracy that the first run of each pair has more than the second."""
    return [percent(run) - percent(other) for run, other in pairs]


def figures(result: FitResult) -> Run:
    """What a run keeps of a fit."""
    return {
        "correct": round(result.test_metric * result.test_samples),
        "samples": result.test_samples,
        "bytes": result.size_bytes,
        "seconds": result.train_seconds,
    }


def by_task(
    runs: Sequence[Run], tasks: Sequence[str], rows: Callable[[Sequence[Run]], list[str]]
) -> list[str]:
    """A section of a page for each task that has runs: where they were measured, and the lines of
    their table.
    """
    lines = []
    for task in tasks:
        if own := [run for run in runs if run["task"] == task]:
            lines += ["", f"## {task}", "", origins(own), "", *rows(own)]
    return lines


def origins(runs: Sequence[Run]) -> str:
    """The commands and machines that measured these runs, as a sentence."""
    return f"{'; '.join(dict.fromkeys(run['origin'] for run in runs))}."


def _origin() -> str:
    machine, command = describe_machine(), shlex.join(["python", *sys.argv])
    return (
        f"`{command}` on {machine['gpu'] or machine['cpu']}, torch {machine['torch']}, commit"
        f" {machine['commit']}"
    )
