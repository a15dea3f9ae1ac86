"""Late packs: what accuracy and bytes it costs, and what time it saves, to change the last blocks
only.

    python benchmarks/late.py [--tasks dtd10 digits] [--recipes ...] [--seeds 0] [--epochs 8]
                              [--device cuda] [--workers 8] [--shared FOLDER]
    python benchmarks/late.py --page     write the page from what has been measured

Every run trains a recipe twice in one process, as two trials of a study do: the first computes the
outputs of the blocks that do not change, the second finds them kept. Then it is fitted on training
and validation images, and the reloaded pack tested once. Seconds depend on what else the machine
does; so each run also times a few epochs of the same recipe from block 0 right before, and the
page gives ratios.

Interrupt it and start it again: finished runs are kept. Writes benchmarks/results/late.json and
.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
from sizes import TASKS, open_any

from pipeline.adaptation.depth import blocks_of
from pipeline.adaptation.trunk import KEPT
from pipeline.search.trial import run_trial
from pipeline.specs import Recipe
from pipeline.training import Inputs
from pipeline.training.fit import fit

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "late.json"
SHARES = (0, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Of the blocks, that do not change."""
TIMED_EPOCHS = 3
PARTS: dict[str, dict[str, Any]] = {
    "bottleneck w=8": {"adapter": {"width": 8, "bits": 1}},
    "LoRA r=4": {"lora": {"rank": 4, "bits": 1, "scale": 4}},
    "norms, biases": {"norms": {"which": "all", "bits": 1}, "biases": {"bits": 1}},
}
RECIPES = {f"{name}, {share:.2f}": (name, share) for name in PARTS for share in SHARES}


def recipe_of(run: Run, inputs: Inputs) -> Recipe:
    """The recipe of a run, with the block that its share of this backbone's blocks names."""
    name, share = RECIPES[run["recipe"]]
    count = max(blocks_of(inputs.backbone).values()) + 1
    training = {"learning_rate": None, "epochs": run["epochs"]}
    content = {**PARTS[name], "from_block": round(share * count), "head": {"bits": 2}}
    return Recipe.model_validate({**content, "training": training})


def seconds_of(inputs: Inputs, recipe: Recipe, device: str) -> tuple[float, float]:
    """Seconds of a trial, and its last validation score."""
    started = time.perf_counter()
    *_, (score, _) = run_trial(inputs, recipe, None, device=device)
    return time.perf_counter() - started, score.value


def measure(run: Run, place: Place) -> Run:
    """One recipe: a short trial from block 0, two trials and a fit."""
    inputs = with_seed(open_any(run["task"], place), run["seed"])
    recipe, device = recipe_of(run, inputs), place.device
    short = recipe.training.changed(epochs=TIMED_EPOCHS)
    whole = recipe.changed(from_block=0, training=short)
    seconds_of(inputs, whole.changed(training=short.changed(epochs=1)), device)  # reads the images
    KEPT.clear()
    whole_seconds, _ = seconds_of(inputs, whole, device)
    first, _ = seconds_of(inputs, recipe.changed(training=short), device)
    again, _ = seconds_of(inputs, recipe.changed(training=short), device)
    _, value = seconds_of(inputs, recipe, device)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(inputs, recipe, None, Path(folder) / "fit", device=device)
    return {
        **run,
        "from_block": recipe.from_block,
        "validation": value,
        "val_samples": len(inputs.splits["val"].samples),
        "first_ratio": round(first / whole_seconds, 3),
        "again_ratio": round(again / whole_seconds, 3),
        **figures(result),
    }


def page(runs: Sequence[Run]) -> str:
    """A table per task."""
    lines = [
        "# Late packs",
        "",
        "The recipe's parts have 1 bit, the head 2. `from` is the first block that changes. Time",
        f"is that of a trial of {TIMED_EPOCHS} epochs, as a share of that from block 0 in the",
        "same process: `first` computes the outputs of the earlier blocks, `again` finds them",
        "kept, as all but the first trial of a study do. Test accuracy, with its standard error,",
        "is that of the reloaded pack.",
        *by_task(runs, TASKS, _rows),
    ]
    return "\n".join(lines) + "\n"


def _rows(runs: Sequence[Run]) -> list[str]:
    lines = [
        "| recipe | from | bytes | validation % | test % | time, first | again | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        own = [run for run in runs if run["recipe"] == recipe]
        if not own:
            continue
        share, error = accuracy_of(own)
        first, again, value = (
            np.mean([run[key] for run in own])
            for key in ("first_ratio", "again_ratio", "validation")
        )
        lines.append(
            f"| {RECIPES[recipe][0]} | {own[0]['from_block']} | {own[0]['bytes']:,} |"
            f" {100 * value:.1f} | {100 * share:.1f} ± {100 * error:.1f} | {first:.2f} |"
            f" {again:.2f} | {len(own)} |"
        )
    return lines


def main() -> None:
    """Measure what is missing, write the page."""
    arguments = parse_arguments(__doc__, TASKS, "recipe", RECIPES, (0,))
    runs = measure_missing(RESULTS, arguments, "recipe", lambda runs, place: None, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
