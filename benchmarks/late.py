"""Late packs: what accuracy and bytes it costs, and what time of a study it saves, to change the
last blocks only.

    python benchmarks/late.py [--tasks dtd10 digits] [--recipes ...] [--seeds 0] [--epochs 8]
                              [--rounds 2] [--workers 1] [--shared FOLDER]
    python benchmarks/late.py --page     write the page from what has been measured

A study is a trial per learning rate, from an empty memory: the first trial computes the outputs of
the blocks that do not change, which the later ones find kept. Every run makes a study for each
number of blocks that change, and one of all blocks, in one process, and then all of them again, in
reverse, for each further round; ratios are those within a round. Seconds are those of the processor
on one thread, so other work on the machine hardly counts. Each study's best trial by validation is
fitted on training and validation images, and the reloaded pack tested once.

Interrupt it and start it again: finished runs are kept. Writes benchmarks/results/late.json and
.md.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pages import table
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
from pipeline.inputs.learning_rate import default_learning_rate
from pipeline.search.trial import run_trial
from pipeline.specs import Recipe
from pipeline.training import Inputs
from pipeline.training.fit import fit

RESULTS = Path(__file__).parent / "results" / "late.json"
SHARES = (0, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Of the blocks, that do not change."""
RATES = (0.5, 1, 2, 4)
"""Of the default learning rate: a study's trials."""
PARTS: dict[str, dict[str, Any]] = {
    "bottleneck w=8": {"adapter": {"width": 8, "bits": 1}},
    "LoRA r=4": {"lora": {"rank": 4, "bits": 1, "scale": 4}},
    "norms, biases": {"norms": {"which": "all", "bits": 1}, "biases": {"bits": 1}},
}
COLUMNS = (
    "recipe",
    "blocks that change",
    "bytes",
    "validation %",
    "test %",
    "study, s",
    "study, ratio",
    "first trial",
    "later trial",
    "rounds",
)


def recipes_of(run: Run, inputs: Inputs, blocks: int) -> dict[int, Recipe]:
    """The run's recipe for each share of blocks that do not change, by the first that does."""
    training = {"learning_rate": None, "epochs": run["epochs"]}
    content = {**PARTS[run["recipe"]], "head": {"bits": 2}, "training": training}
    recipe = Recipe.model_validate(content)
    return {
        first: recipe.changed(from_block=first) for first in (round(s * blocks) for s in SHARES)
    }


def trials_of(inputs: Inputs, recipe: Recipe) -> list[Recipe]:
    """A study's trials."""
    default = default_learning_rate(inputs.backbone.model)
    rates = [share * default for share in RATES]
    return [recipe.changed(training=recipe.training.changed(learning_rate=rate)) for rate in rates]


def study(inputs: Inputs, recipe: Recipe) -> tuple[list[float], list[float]]:
    """Processor seconds of each trial, and their last validation scores."""
    KEPT.clear()
    seconds, scores = [], []
    for trial in trials_of(inputs, recipe):
        started = time.process_time()
        *_, (score, _) = run_trial(inputs, trial, None)
        seconds.append(round(time.process_time() - started, 2))
        scores.append(score.value)
    return seconds, scores


def measure(run: Run, place: Place) -> Run:
    """The studies of one recipe, round by round, and the fit of each study's best trial."""
    inputs = with_seed(open_any(run["task"], place), run["seed"])
    blocks = max(blocks_of(inputs.backbone).values()) + 1
    recipes = recipes_of(run, inputs, blocks)
    seconds: dict[int, list[list[float]]] = {first: [] for first in recipes}
    best: dict[int, tuple[float, Recipe]] = {}
    study(inputs, recipes[0].changed(training={"epochs": 1}))  # reads the images
    for number in range(run["rounds"]):
        for first in sorted(recipes, reverse=number % 2 == 1):
            spent, scores = study(inputs, recipes[first])
            seconds[first].append(spent)
            trials = trials_of(inputs, recipes[first])
            best[first] = max(zip(scores, trials, strict=True), key=lambda each: each[0])
    return {
        **run,
        "blocks": blocks,
        "images": {name: len(inputs.splits[name]) for name in ("train", "val")},
        "studies": [
            {"from_block": first, "cpu_seconds": seconds[first], **tested(inputs, *best[first])}
            for first in recipes
        ],
    }


def tested(inputs: Inputs, validation: float, recipe: Recipe) -> Run:
    """The figures of a study's best trial."""
    with tempfile.TemporaryDirectory() as folder:
        result = fit(inputs, recipe, None, Path(folder) / "fit")
    rate = recipe.training.learning_rate
    return {"validation": validation, "learning_rate": rate, **figures(result)}


def page(runs: Sequence[Run]) -> str:
    """A table per task."""
    lines = [
        "# Late packs",
        "",
        f"The recipe's parts have 1 bit, the head 2. A study has {len(RATES)} trials, one per",
        f"learning rate ({', '.join(map(str, RATES))} times the default), all trained to their",
        "end. `study, s` are processor seconds on one thread, the outputs of the blocks that do",
        "not change included; `ratio` is to the study that changes all blocks, in the same round",
        "of the same process, mean ± standard error over the rounds. The first trial computes",
        "these outputs, the later ones find them kept; their ratios are to such trials of the",
        "study that changes all blocks. So the more trials a study has, the closer it comes to",
        "the last ratio. Test accuracy, with its standard error, is that of the study's best",
        "trial by validation, fitted and reloaded.",
        *by_task(runs, TASKS, _rows),
    ]
    return "\n".join(lines) + "\n"


def _rows(runs: Sequence[Run]) -> list[str]:
    rows = []
    for recipe in PARTS:
        own = [run for run in runs if run["recipe"] == recipe]
        for first in own[0]["studies"] if own else ():
            rows.append(_row(own, first["from_block"]))
    kinds = {(run["images"]["train"], run["images"]["val"], run["epochs"]) for run in runs}
    described = "; ".join(
        f"{train} training and {val} validation images, epochs: {epochs}"
        for train, val, epochs in sorted(kinds)
    )
    return [
        f"{described}, seeds: {len({run['seed'] for run in runs})}.",
        "",
        *table(COLUMNS, rows),
    ]


def _row(runs: Sequence[Run], first: int) -> list[str]:
    """The row of the studies from a block on, over the seeds."""
    pairs = [(_study(run, first), _study(run, 0)) for run in runs]
    own = [study for study, _ in pairs]
    rounds = [
        (spent, whole)
        for study, other in pairs
        for spent, whole in zip(study["cpu_seconds"], other["cpu_seconds"], strict=True)
    ]
    share, error = accuracy_of(own)
    return [
        runs[0]["recipe"],
        f"{runs[0]['blocks'] - first} of {runs[0]['blocks']}",
        f"{fmean(study['bytes'] for study in own):,.0f}",
        f"{100 * fmean(study['validation'] for study in own):.1f}",
        f"{100 * share:.1f} ± {100 * error:.1f}",
        f"{fmean(sum(spent) for spent, _ in rounds):.1f}",
        _mean([sum(spent) / sum(whole) for spent, whole in rounds]),
        _mean([spent[0] / whole[0] for spent, whole in rounds]),
        _mean([sum(spent[1:]) / sum(whole[1:]) for spent, whole in rounds]),
        str(len(rounds)),
    ]


def _study(run: Run, first: int) -> Run:
    studies: list[Run] = run["studies"]
    return next(study for study in studies if study["from_block"] == first)


def _mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{fmean(values):.2f}"
    return f"{fmean(values):.2f} ± {stdev(values) / math.sqrt(len(values)):.2f}"


def main() -> None:
    """Measure what is missing, write the page."""
    counts = {"rounds": 2}
    arguments = parse_arguments(__doc__, TASKS, "recipe", PARTS, (0,), counts)
    runs = measure_missing(RESULTS, arguments, "recipe", lambda runs, place: None, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
