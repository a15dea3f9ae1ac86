"""Point clouds: methods under byte budgets on drawn solids and on LiDAR objects, what pretraining
the small backbone is worth, and what the neighbourhood search costs.

    python benchmarks/points.py [--tasks dales500 solids] [--methods ...] [--seeds 0 1 2]
                                [--epochs 8] [--trials 3] [--workers 1] [--shared FOLDER]
    python benchmarks/points.py --page     write the page from what has been measured
    OMP_NUM_THREADS=2 python benchmarks/points.py --neighbours    time the neighbourhood search

The backbone is that of `tasks/points`, which benchmarks/pretrain_points.py pretrains. Every method
trains each of its recipes on train and ranks them on validation: the default search the first
`--trials` of its space, without early stopping, full fine-tuning two learning rates; others have
one recipe. The champion's recipe is fitted on train and validation, and its pack reads the test
set once, reloaded from its file.

Interrupt it and start it again: finished trials and runs are kept. Writes
benchmarks/results/points.json and .md, and points_neighbours.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from runs import (
    Place,
    Run,
    accuracy_of,
    by_task,
    figures,
    measure_missing,
    parse_arguments,
    with_seed,
)
from searches import BUDGETS, search_and_fit, within_budget
from torch.utils.flop_counter import FlopCounterMode

from pipeline.adaptation import attach
from pipeline.backbones import load_backbone
from pipeline.backbones.neighbours import farthest_points, gather_points, nearest_points
from pipeline.data import prepare
from pipeline.data.drawn_solids import SOLIDS
from pipeline.specs import Budget, Recipe, Task
from pipeline.specs.catalogue import catalogue_folder
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, open_inputs

RESULTS = Path(__file__).parent / "results" / "points.json"
NEIGHBOURS = RESULTS.with_name("points_neighbours.json")
TASKS = ("solids", "dales500")
LINEAR: dict[str, Any] = {"preset": "linear", "head": {"bits": 32}}
BANK: dict[str, Any] = {
    "smoa": {"experts": 4, "width": 16, "heads": 4, "prompt_generator": True, "bits": 1},
    "norms": {"bits": 8},
    "class_token": {"bits": 8},
    "head": {"bits": 2},
}
RECIPES: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"full": {"bits": 32}, "head": {"bits": 32}},
    "linear": LINEAR,
    "linear, random weights": LINEAR,
    "AdaptFormer, 32 bits": {"adapter": {"width": 8, "bits": 32}, "head": {"bits": 32}},
    "AdaptFormer, 1 bit": {"adapter": {"width": 8, "bits": 1}, "head": {"bits": 2}},
    "Adapter-X, 1 bit": {**BANK, "smoa": {**BANK["smoa"], "placement": "after_mlp"}},
    "DAPT-X, 1 bit": BANK,
    "GPS, 4 bits": {
        "connections": {"top_k": 1, "bits": 4},
        "biases": {"bits": 8},
        "head": {"bits": 8},
    },
}
METHODS = (*RECIPES, *BUDGETS)
EARLIER = ("default search, 16 KiB, champion by errors alone",)
"""Measured before the champion's rule compared likelihoods; kept, not measured again."""
FULL_RATES = (0.0003, 0.001)
"""Of full fine-tuning, for which the default learning rate is too high."""
GOAL_PACK, REFERENCE, GOAL_POINTS = "default search, 16 KiB", "full fine-tuning", 1.0
"""The pack should lose at most this much against the reference."""
REPEATS = 25


def open_points(run: Run, place: Place) -> Inputs:
    """A task, prepared: the catalogue's, or the same with the LiDAR objects."""
    name, is_random = run["task"], run["method"].endswith("random weights")
    task = load_task(catalogue_folder() / "points" / "solids.yaml")
    content = task.model_dump()
    if name == "dales500":
        folder = place.shared / "data" / name
        data = {"format": "folder", "train": str(folder / "train"), "test": str(folder / "test")}
        content |= {"name": name, "data": data}
    if is_random:
        content["backbone"]["weights"] = "random"
    task = Task.model_validate(content)
    prepare(task, place.workdir / name / "data")
    return with_seed(open_inputs(task, place.workdir / name / "data"), run["seed"])


def recipes_of(run: Run, inputs: Inputs) -> tuple[Inputs, list[Recipe]]:
    """The task as a method sees it, and the recipes that the method tries."""
    training = {"epochs": run["epochs"], "augment": "light"}
    if run["method"] in BUDGETS:
        return within_budget(inputs, BUDGETS[run["method"]], training, run["trials"])
    content = RECIPES[run["method"]]
    rates = FULL_RATES if "full" in content else (None,)
    unlimited = inputs.task.model_copy(update={"budget": Budget(max_bytes=2**40, level=0.5)})
    return replace(inputs, task=unlimited), [
        Recipe.model_validate({**content, "training": {**training, "learning_rate": rate}})
        for rate in rates
    ]


def measure(run: Run, place: Place) -> Run:
    """One method on one task, from its trials to the tested pack."""
    inputs, recipes = recipes_of(run, open_points(run, place))
    weights = inputs.backbone.fingerprint[:8]
    folder = inputs.data_folder.parent / f"{weights}-{run['epochs']}-{run['seed']}"
    found = search_and_fit(inputs, recipes, folder, place.device)
    return {
        **run,
        "champion": found.champion.point,
        "learning_rate": found.recipe.training.learning_rate,
        "val": found.champion.val_metric,
        **figures(found.result),
        "seconds": found.seconds,
    }


def page(runs: Sequence[Run], times: dict[str, Any]) -> str:
    """Whether the goal is met, a table per task, and the times of the neighbourhood search."""
    lines = [
        "# Point clouds",
        "",
        "The backbone of `tasks/points`, a small one: numbers compare ways to adapt it. Test",
        "accuracy of the reloaded pack over all seeds, with its standard error for one seed over",
        "the test clouds. Few epochs, to fit one core: all numbers are below what whole ones give.",
        "Seconds are of a machine that did other work, too.",
        "",
        *(line for own in _by_settings(runs) for task in TASKS for line in _goal_lines(own, task)),
        *(line for own in _by_settings(runs) for line in by_task(own, TASKS, _rows)),
        "",
        "## Neighbourhood search",
        "",
        *_times(times),
    ]
    return "\n".join(lines) + "\n"


def _by_settings(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each number of epochs and of trials."""
    found: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        found.setdefault((run["epochs"], run["trials"]), []).append(run)
    return [found[settings] for settings in sorted(found)]


def _goal_lines(runs: Sequence[Run], task: str) -> list[str]:
    """How far the pack is from full fine-tuning, over the seeds that both have."""
    own = {(run["method"], run["seed"]): run for run in runs if run["task"] == task}
    seeds = [seed for method, seed in own if method == GOAL_PACK and (REFERENCE, seed) in own]
    if not seeds:
        return []
    shares = {
        method: np.array([own[method, s]["correct"] / own[method, s]["samples"] for s in seeds])
        for method in (GOAL_PACK, REFERENCE)
    }
    points = 100 * (shares[GOAL_PACK] - shares[REFERENCE])
    is_met = "met" if points.mean() >= -GOAL_POINTS else "not met"
    each = ", ".join(f"{value:+.1f}" for value in points)
    return [
        f"- {task}, {runs[0]['epochs']} epochs, {runs[0]['trials']} trials: the pack of the"
        f" {GOAL_PACK}, is {points.mean():+.1f} points from {REFERENCE} (by seed {each});"
        f" the goal, at most {GOAL_POINTS:g} points below, is {is_met}."
    ]


def _rows(runs: Sequence[Run]) -> list[str]:
    lines = [
        f"{runs[0]['epochs']} epochs, {runs[0]['trials']} trials of a search.",
        "",
        "| method | bytes | test % | seconds, trials and fit | seeds |",
        "|---|---|---|---|---|",
    ]
    for method in (*METHODS, *EARLIER):
        own = [run for run in runs if run["method"] == method]
        if not own:
            continue
        share, error = accuracy_of(own)
        size, seconds = (np.mean([run[key] for run in own]) for key in ("bytes", "seconds"))
        lines.append(
            f"| {method} | {size:,.0f} | {100 * share:.1f} ± {100 * error:.1f} |"
            f" {seconds:.0f} | {len(own)} |"
        )
    return lines


def _times(times: dict[str, Any]) -> list[str]:
    if not times:
        return ["Not measured yet."]
    machine = times["machine"]
    return [
        f"`{times['command']}` on {machine['cpu']}, {times['threads']} threads, torch"
        f" {machine['torch']}, commit {machine['commit']}. Milliseconds for a batch of 32 clouds,",
        f"the best of {REPEATS}. The last column is the time against the number of multiplications",
        "and additions, in billions a second.",
        "",
        "| step | ms | limit, ms | operations | 10^9/s |",
        "|---|---|---|---|---|",
        *(
            f"| {row['step']} | {row['ms']:.1f} | {row['limit_ms'] or ''} |"
            f" {row['operations']:,} | {row['operations'] / row['ms'] / 1e6:.1f} |"
            for row in times["rows"]
        ),
    ]


def neighbour_times() -> dict[str, Any]:
    """Milliseconds of farthest-point sampling, of nearest neighbours, and of the backbone."""
    clouds = torch.randn(32, 2048, 3, generator=torch.Generator().manual_seed(0))
    few = clouds[:, :1024].contiguous()
    centres = gather_points(clouds, farthest_points(clouds, 128))
    # A distance takes three subtractions, three products and two sums, and one comparison.
    farthest = {count: 32 * (count - 1) * points * 9 for count, points in ((64, 1024), (128, 2048))}
    steps: list[tuple[str, Callable[[], object], int, int | None]] = [
        ("farthest 64 of 1,024 points", lambda: farthest_points(few, 64), farthest[64], 20),
        ("farthest 128 of 2,048", lambda: farthest_points(clouds, 128), farthest[128], None),
        (
            "nearest 32 of 2,048 to 128 centres",
            lambda: nearest_points(clouds, centres, 32),
            32 * 128 * 2048 * 8,
            60,
        ),
    ]
    steps += [(*each, None) for each in network_steps()]
    rows = [
        {"step": name, "ms": _milliseconds(step), "limit_ms": limit, "operations": operations}
        for name, step, operations, limit in steps
    ]
    return {
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} python"
        f" {' '.join(sys.argv)}",
        "threads": torch.get_num_threads(),
        "machine": describe_machine(),
        "rows": rows,
    }


def network_steps() -> list[tuple[str, Callable[[], object], int]]:
    """A forward pass and a training step of the backbone of `tasks/points`, with their operations,
    and a matrix product, the most that the processor does.
    """
    task = load_task(catalogue_folder() / "points" / "solids.yaml")
    backbone = load_backbone(task.backbone, task.input)
    model = attach(backbone, Recipe.model_validate(RECIPES["AdaptFormer, 1 bit"]), len(SOLIDS))
    clouds = backbone.takes.noise(32).half()
    labels = torch.arange(32) % len(SOLIDS)
    square = torch.randn(1024, 1024)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(clouds)

    def train() -> None:
        torch.nn.functional.cross_entropy(model.train()(clouds), labels).backward()

    named: dict[str, Callable[[], object]] = {
        "forward pass of the backbone": forward,
        "training step of AdaptFormer at 1 bit": train,
        "matrix product 1,024 x 1,024 x 1,024": lambda: square @ square,
    }
    return [(name, step, _operations(step)) for name, step in named.items()]


def _operations(step: Callable[[], object]) -> int:
    """Multiplications and additions of all matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def _milliseconds(step: Callable[[], object]) -> float:
    step()
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - started)
    return 1000 * best


def main() -> None:
    """Measure what is missing, write the page."""
    if sys.argv[1:] == ["--neighbours"]:
        NEIGHBOURS.write_text(json.dumps(neighbour_times(), indent=1) + "\n")
        sys.argv[1:] = ["--page"]
    counts = {"trials": 3}
    arguments = parse_arguments(__doc__, TASKS, "method", METHODS, (0, 1, 2), counts)
    runs = measure_missing(RESULTS, arguments, "method", lambda runs, place: None, measure)
    times = json.loads(NEIGHBOURS.read_text()) if NEIGHBOURS.exists() else {}
    RESULTS.with_suffix(".md").write_text(page(runs, times))


if __name__ == "__main__":
    main()
