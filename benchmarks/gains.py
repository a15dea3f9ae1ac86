"""What settings of the training gain that cost no byte: packs of 1 bit with each setting by itself,
against the same recipe without it.

    python benchmarks/gains.py [--tasks mnist cifar10 ...] [--variants ...] [--seeds 0 1 2]
                               [--epochs 15] [--limit 800] [--device cuda] [--workers 8]
                               [--shared FOLDER]
    python benchmarks/gains.py --page     write the page from what has been measured

The embedded backbone at 32 px, on the tasks' first images up to a limit; the packs are trained on
training and validation images together, and the reloaded pack is tested once. All variants of a
recipe share data, seeds and other settings; nothing is tuned.

Interrupt it and start it again: finished runs are kept. Writes benchmarks/results/gains.json and
.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from image_tasks import TASKS, opened_run
from pages import mean_difference
from runs import (
    Place,
    Run,
    by_task,
    figures,
    measure_missing,
    paired,
    parse_arguments,
    percent,
    points_of,
)

from pipeline.training.fit import fit

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gains.json"
SIZE_PX, LIMIT = 32, 800
RECIPES: dict[str, dict[str, Any]] = {
    "bottleneck w=8": {"adapter": {"width": 8, "bits": 1}, "head": {"bits": 2}},
    "LoRA r=4": {"lora": {"rank": 4, "bits": 1, "scale": 4}, "head": {"bits": 2}},
}
PLAIN = "plain"
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "distill 0.5": {"distill": 0.5},
    "label_smoothing 0.1": {"label_smoothing": 0.1},
    "ema 0.98": {"ema": 0.98},
    "drop_path 0.1": {"drop_path": 0.1},
    "augment light": {"augment": "light"},
    "augment crop": {"augment": "crop"},
}
VARIANTS = {f"{name}, {setting}": (name, setting) for name in RECIPES for setting in SETTINGS}


def measure(run: Run, place: Place) -> Run:
    """One fit."""
    name, setting = VARIANTS[run["variant"]]
    training = {"epochs": run["epochs"], **SETTINGS[setting]}
    recipe = {**RECIPES[name], "training": training}
    inputs = opened_run(run, place, recipe, SIZE_PX)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(inputs, inputs.task.recipe, None, Path(folder) / "fit", device=place.device)
    return {**run, "images": len(inputs.splits["trainval"]), **figures(result)}


def page(runs: Sequence[Run]) -> str:
    """A table per task, and the mean over the tasks."""
    lines = [
        "# Gains that cost no byte",
        "",
        "The embedded backbone at 32 px; each setting of the training by itself. `distill` is the",
        "share of the targets that comes from the whole backbone, fine-tuned for as many epochs on",
        "the same images; `ema` the decay of a moving average of the trained values, which the",
        "pack gets. Test accuracy in percent is that of reloaded packs, the mean over the seeds;",
        "differences to the same recipe without the setting are paired by task and seed, ± their",
        "standard error.",
        *_means(runs),
        *by_task(runs, TASKS, _rows),
    ]
    return "\n".join(lines) + "\n"


def differences(runs: Sequence[Run], variant: str) -> list[float]:
    """Points of test accuracy gained over the same recipe, task and seed without the setting."""
    name, _ = VARIANTS[variant]
    return points_of(paired(runs, variant, f"{name}, {PLAIN}"))


def _means(runs: Sequence[Run]) -> list[str]:
    lines = ["", f"| setting | {' | '.join(RECIPES)} | both | pairs |", "|---|---|---|---|---|"]
    for setting in SETTINGS:
        found = [differences(runs, f"{name}, {setting}") for name in RECIPES]
        both = [points for each in found for points in each]
        if setting != PLAIN and both:
            shown = " | ".join(mean_difference(each) for each in [*found, both])
            lines.append(f"| {setting} | {shown} | {len(both)} |")
    return lines


def _rows(runs: Sequence[Run]) -> list[str]:
    lines = [
        "| recipe | setting | bytes | test % | difference | images | epochs | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, (name, setting) in VARIANTS.items():
        own = [run for run in runs if run["variant"] == variant]
        if own:
            mean = fmean(map(percent, own))
            points = "" if setting == PLAIN else mean_difference(differences(runs, variant))
            lines.append(
                f"| {name} | {setting} | {own[0]['bytes']:,} | {mean:.1f} | {points} |"
                f" {own[0]['images']} | {own[0]['epochs']} | {len(own)} |"
            )
    return lines


def main() -> None:
    """Measure what is missing, write the page."""
    counts = {"limit": LIMIT}
    arguments = parse_arguments(__doc__, TASKS, "variant", VARIANTS, (0, 1, 2), counts)
    runs = measure_missing(RESULTS, arguments, "variant", lambda runs, place: None, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
