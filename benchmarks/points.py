"""Point clouds: methods on drawn solids and on LiDAR objects, with a small random backbone, and
what the neighbourhood search costs.

    python benchmarks/points.py [--tasks dales500 solids] [--recipes ...] [--seeds 0 1 2]
                                [--epochs 8] [--workers 1] [--shared FOLDER]
    python benchmarks/points.py --page     write the page from what has been measured

Each run fits a recipe on training and validation clouds and tests the reloaded pack once. The
backbone has random weights, so numbers compare ways to adapt it and say nothing of pretrained ones.
Times of the neighbourhood search are of the processor, with one thread.

Interrupt it and start it again: finished runs are kept. Writes benchmarks/results/points.json and
.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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

from pipeline.backbones.neighbours import farthest_points, gather_points, nearest_points
from pipeline.data import prepare
from pipeline.inputs.task_inputs import Inputs, open_inputs
from pipeline.selection import select_locally
from pipeline.specs import Recipe, Task
from pipeline.specs.catalogue import catalogue_folder
from pipeline.specs.task_files import load_task
from pipeline.training.fit import fit

RESULTS = Path(__file__).parent / "results" / "points.json"
TASKS = ("solids", "dales500")
RECIPES: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"full": {"bits": 32}, "head": {"bits": 32}},
    "linear": {"preset": "linear", "head": {"bits": 32}},
    "AdaptFormer": {"adapter": {"width": 8, "bits": 32}, "head": {"bits": 32}},
    "AdaptFormer, 1 bit": {"adapter": {"width": 8, "bits": 1}, "head": {"bits": 2}},
    "Adapter-X, 1 bit": {
        "smoa": {"placement": "after_mlp", "experts": 4, "width": 16, "heads": 4}
        | {"prompt_generator": True, "bits": 1},
        "norms": {"bits": 8},
        "class_token": {"bits": 8},
        "head": {"bits": 2},
    },
    "GPS, 4 bits": {
        "connections": {"top_k": 1, "bits": 4},
        "biases": {"bits": 8},
        "head": {"bits": 8},
    },
}
FULL_RATE = 0.001
"""Of full fine-tuning, for which the default learning rate is too high."""


def open_points(name: str, place: Place) -> Inputs:
    """A task, prepared: the catalogue's, or the same with the LiDAR objects."""
    task = load_task(catalogue_folder() / "points" / "solids.yaml")
    if name == "dales500":
        folder = place.shared / "data" / name
        data = {"format": "folder", "train": str(folder / "train"), "test": str(folder / "test")}
        task = Task.model_validate({**task.model_dump(), "name": name, "data": data})
    prepare(task, place.workdir / name)
    return open_inputs(task, place.workdir / name)


def measure(run: Run, place: Place) -> Run:
    """One fit."""
    inputs = with_seed(open_points(run["task"], place), run["seed"])
    content = RECIPES[run["recipe"]]
    rate = FULL_RATE if "full" in content else None
    training = {"learning_rate": rate, "epochs": run["epochs"], "augment": "light"}
    recipe = Recipe.model_validate({**content, "training": training})
    selected = select_locally(inputs, 1) if recipe.connections else None
    with tempfile.TemporaryDirectory() as folder:
        return {**run, **figures(fit(inputs, recipe, selected, Path(folder), device=place.device))}


def page(runs: Sequence[Run], times: dict[str, float]) -> str:
    """A table per task."""
    lines = [
        "# Point clouds",
        "",
        "The backbone of `tasks/points` with random weights: numbers compare ways to adapt it.",
        "Test accuracy of the reloaded pack, with its standard error over the test clouds.",
        *by_task(runs, TASKS, _rows),
        "",
        "## Neighbourhood search",
        "",
        "Milliseconds of the processor for a batch of 32 clouds, one thread, the best of five.",
        "",
        "| step | ms |",
        "|---|---|",
        *(f"| {name} | {milliseconds:.1f} |" for name, milliseconds in times.items()),
    ]
    return "\n".join(lines) + "\n"


def _rows(runs: Sequence[Run]) -> list[str]:
    lines = ["| recipe | bytes | test % | seconds of training | seeds |", "|---|---|---|---|---|"]
    for recipe in RECIPES:
        own = [run for run in runs if run["recipe"] == recipe]
        if not own:
            continue
        share, error = accuracy_of(own)
        seconds = np.mean([run["seconds"] for run in own])
        lines.append(
            f"| {recipe} | {own[0]['bytes']:,} | {100 * share:.1f} ± {100 * error:.1f} |"
            f" {seconds:.0f} | {len(own)} |"
        )
    return lines


def neighbour_times() -> dict[str, float]:
    """Milliseconds of farthest-point sampling and of nearest neighbours."""
    torch.set_num_threads(1)
    clouds = torch.randn(32, 2048, 3, generator=torch.Generator().manual_seed(0))
    few = clouds[:, :1024].contiguous()
    centres = gather_points(clouds, farthest_points(clouds, 128))
    return {
        "farthest 64 of 1,024 points": _milliseconds(lambda: farthest_points(few, 64)),
        "farthest 128 of 2,048 points": _milliseconds(lambda: farthest_points(clouds, 128)),
        "nearest 32 of 2,048 points to 128 centres": _milliseconds(
            lambda: nearest_points(clouds, centres, 32)
        ),
    }


def _milliseconds(step: Callable[[], object]) -> float:
    step()
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        step()
        best = min(best, time.process_time() - started)
    return 1000 * best


def main() -> None:
    """Measure what is missing, write the page."""
    arguments = parse_arguments(__doc__, TASKS, "recipe", RECIPES, (0, 1, 2))
    runs = measure_missing(RESULTS, arguments, "recipe", lambda runs, place: None, measure)
    RESULTS.with_suffix(".md").write_text(page(runs, neighbour_times()))


if __name__ == "__main__":
    main()
