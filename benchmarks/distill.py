"""What distillation into the pack gains: recipes of 1 bit taught by the labels alone, and by the
whole backbone fine-tuned on the same images, in part and alone.

    python benchmarks/distill.py [--tasks mnist cifar10 ...] [--variants ...] [--seeds 0 1 2]
                                 [--epochs 15] [--device cuda] [--workers 8] [--shared FOLDER]
    python benchmarks/distill.py --page     write the page from what has been measured

The embedded backbone at 32 px, on the first tasks' images up to a limit; the packs are trained on
training and validation images together, and the reloaded pack is tested once. All variants of a
recipe share data, seeds and settings; nothing is tuned.

Interrupt it and start it again: finished runs are kept. Writes benchmarks/results/distill.json and
.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from image_tasks import TASKS, image_task, opened
from runs import (
    Place,
    Run,
    by_task,
    figures,
    measure_missing,
    parse_arguments,
    percent,
    with_seed,
)

from pipeline.training.fit import fit

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "distill.json"
SIZE_PX, LIMIT = 32, 400
RECIPES: dict[str, dict[str, Any]] = {
    "bottleneck w=8": {"adapter": {"width": 8, "bits": 1}, "head": {"bits": 2}},
    "LoRA r=4": {"lora": {"rank": 4, "bits": 1, "scale": 4}, "head": {"bits": 2}},
}
SHARES = (None, 0.5, 0.9)
VARIANTS = {f"{name}, {share or 0:g}": (name, share) for name in RECIPES for share in SHARES}


def measure(run: Run, place: Place) -> Run:
    """One fit."""
    name, share = VARIANTS[run["variant"]]
    training = {"epochs": run["epochs"], "distill": share}
    recipe = {**RECIPES[name], "training": training}
    task = image_task(run["task"], "embedded", place.shared, SIZE_PX, recipe)
    inputs = with_seed(opened(task, place.workdir / f"{task.name}-{SIZE_PX}", LIMIT), run["seed"])
    with tempfile.TemporaryDirectory() as folder:
        result = fit(inputs, inputs.task.recipe, None, Path(folder) / "fit", device=place.device)
    return {**run, "images": len(inputs.splits["trainval"]), **figures(result)}


def page(runs: Sequence[Run]) -> str:
    """A table per task, and the mean over the tasks."""
    lines = [
        "# Distillation into the pack",
        "",
        "The embedded backbone at 32 px. `distill` is the share of the targets that comes from the",
        "whole backbone, fine-tuned for as many epochs on the same images. Test accuracy in",
        "percent is that of reloaded packs, the mean over the seeds; differences to the same",
        "recipe without a teacher are paired by seed, ± their standard error.",
        *_means(runs),
        *by_task(runs, TASKS, _rows),
    ]
    return "\n".join(lines) + "\n"


def differences(runs: Sequence[Run], variant: str) -> list[float]:
    """Points of test accuracy gained over the same recipe, task and seed without a teacher."""
    name, _ = VARIANTS[variant]
    alone = {
        (run["task"], run["seed"], run["epochs"]): run
        for run in runs
        if run["variant"] == f"{name}, 0"
    }
    pairs = [
        (run, alone.get((run["task"], run["seed"], run["epochs"])))
        for run in runs
        if run["variant"] == variant
    ]
    return [percent(run) - percent(other) for run, other in pairs if other is not None]


def _shown(points: Sequence[float]) -> str:
    if not points:
        return ""
    error = f" ± {stdev(points) / len(points) ** 0.5:.1f}" if len(points) > 1 else ""
    return f"{fmean(points):+.1f}{error}"


def _means(runs: Sequence[Run]) -> list[str]:
    lines = ["", "| recipe | distill | difference over all pairs | pairs |", "|---|---|---|---|"]
    for variant, (name, share) in VARIANTS.items():
        if share is not None and (points := differences(runs, variant)):
            lines.append(f"| {name} | {share:g} | {_shown(points)} | {len(points)} |")
    return lines


def _rows(runs: Sequence[Run]) -> list[str]:
    lines = [
        "| recipe | distill | bytes | test % | difference | images | epochs | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, (name, share) in VARIANTS.items():
        own = [run for run in runs if run["variant"] == variant]
        if own:
            mean = fmean(map(percent, own))
            points = "" if share is None else _shown(differences(runs, variant))
            lines.append(
                f"| {name} | {share or 0:g} | {own[0]['bytes']:,} | {mean:.1f} | {points} |"
                f" {own[0]['images']} | {own[0]['epochs']} | {len(own)} |"
            )
    return lines


def main() -> None:
    """Measure what is missing, write the page."""
    arguments = parse_arguments(__doc__, TASKS, "variant", VARIANTS, (0, 1, 2))
    runs = measure_missing(RESULTS, arguments, "variant", lambda runs, place: None, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
