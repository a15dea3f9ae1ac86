"""What the champion's rule gains by comparing the likelihood of the right classes as well as the
errors, on small validation sets.

    python benchmarks/champion_likelihood.py [--tasks digits ...] [--epochs 6] [--draws 200]
                                             [--shared FOLDER] [--workdir FOLDER]

Half of a task's training samples, at most 400, are trained on, and the others validate: by the
default search under 16 KiB, without early stopping. A draw is a study whose validation set is 60 of
the latter; each rule chooses a pack, and its accuracy is that on the other validation samples. The
test sets are never read.

Interrupt it and start it again: finished trials are kept. Writes
benchmarks/results/champion_likelihood.json and .md.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from image_tasks import data_section, opened
from machine import describe_machine
from runs import SHARED
from searches import selection_of, tried, within_budget

from pipeline.inputs.learning_rate import with_learning_rate
from pipeline.kinds import Outcomes, metric_named
from pipeline.search.champion import not_worse_than_best
from pipeline.search.trial_record import TrialJournal, TrialRecord
from pipeline.specs import Budget, SearchSpace, Task
from pipeline.specs.catalogue import catalogue_folder
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs

RESULTS = Path(__file__).parent / "results" / "champion_likelihood.json"
DEMO, IMAGES, CLOUDS = ("digits", "counting", "orientation"), ("mnist", "cifar10"), ("dales500",)
TASKS = (*DEMO, *IMAGES, *CLOUDS)
SAMPLES, CHOOSING, MAX_BYTES = 800, 60, 16 << 10
TRIALS = SearchSpace().trials
ACCURACY = metric_named("accuracy", "classification")
RULES = {"errors": replace(ACCURACY, finer=None), "errors and likelihood": ACCURACY}
LEVEL = Budget().level


def task_named(name: str, shared: Path) -> Task:
    """A task on the embedded backbone of its modality, half of whose samples validate."""
    file = "points/solids.yaml" if name in CLOUDS else f"demo/{name if name in DEMO else 'digits'}"
    content = load_task((catalogue_folder() / file).with_suffix(".yaml")).model_dump()
    if name in IMAGES:
        content |= {"name": name, "data": data_section(name, shared)}
        content["input"]["flip"] = name != "mnist"
    elif name in CLOUDS:
        splits = {split: str(shared / "data" / name / split) for split in ("train", "test")}
        content |= {"name": name, "data": {"format": "folder", **splits}}
    return Task.model_validate({**content, "val_fraction": 0.5})


def trials(inputs: Inputs, folder: Path, epochs: int) -> tuple[list[TrialRecord], TrialJournal]:
    """The default search, and where the validation outputs of its trials are kept."""
    augment = "light" if inputs.task.modality == "points" else "none"
    training = {"epochs": epochs, "augment": augment}
    inputs, recipes = within_budget(inputs, MAX_BYTES, training, TRIALS)
    recipes = [with_learning_rate(recipe, inputs.backbone) for recipe in recipes]
    folder.mkdir(parents=True, exist_ok=True)
    selected, journal = selection_of(inputs, recipes, folder), TrialJournal(folder)
    return [tried(inputs, recipe, selected, journal, "cpu") for recipe in recipes], journal


def simulate(
    records: Sequence[TrialRecord], kept: dict[str, Outcomes], draws: int
) -> dict[str, dict[str, float]]:
    """Mean accuracy in percent, and geometric mean of the bytes, of each rule's choice."""
    rng, samples = np.random.default_rng(0), len(next(iter(kept.values())))
    chosen: dict[str, list[tuple[float, int]]] = {name: [] for name in RULES}
    for _ in range(draws):
        order = rng.permutation(samples)
        here = {key: _only(each, order[:CHOOSING]) for key, each in kept.items()}
        left = {key: _only(each, order[CHOOSING:]) for key, each in kept.items()}
        study = [replace(each, val_metric=ACCURACY.value(here[each.id])) for each in records]
        for name, metric in RULES.items():
            known = functools.partial(_of, here)
            pack = next(not_worse_than_best(study, known, metric, LEVEL))
            chosen[name].append((100 * ACCURACY.value(left[pack.id]), pack.size_bytes))
    return {
        name: {
            "accuracy": fmean(value for value, _ in found),
            "bytes": float(np.exp(fmean(np.log(size) for _, size in found))),
        }
        for name, found in chosen.items()
    }


def _of(kept: dict[str, Outcomes], record: TrialRecord) -> Outcomes:
    return kept[record.id]


def _only(outcomes: Outcomes, numbers: np.ndarray) -> Outcomes:
    return Outcomes(outcomes.outputs[numbers], outcomes.targets[numbers])


def measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    folder = arguments.workdir / f"{name}-{arguments.epochs}"
    inputs = opened(task_named(name, arguments.shared.resolve()), folder / "data", SAMPLES)
    records, journal = trials(inputs, folder, arguments.epochs)
    kept = {each.id: found for each in records if (found := journal.outcomes(each.id))}
    return {
        "task": name,
        "trials": len(records),
        "train_samples": len(inputs.splits["train"]),
        "judging": len(inputs.splits["val"]) - CHOOSING,
        "rules": simulate(records, kept, arguments.draws),
    }


def page(result: dict[str, Any]) -> str:
    """A row per task, and the mean over the tasks."""
    one, other = RULES
    lines = [
        "# The champion by errors, and by likelihood, too",
        "",
        f"`{result['command']}` on {result['machine']['cpu']}, commit",
        f"{result['machine']['commit']}.",
        "",
        f"{CHOOSING} validation samples choose among the trials of the default search under",
        f"{MAX_BYTES >> 10} KiB, {result['epochs']} epochs, at level {LEVEL}; the other validation",
        f"samples judge. Means of {result['draws']} draws; ± is the standard error of one pack's",
        "accuracy on the latter.",
        "",
        f"| task | trials | trained on | % by {one} | % by {other} | points | bytes | bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    gains = []
    for row in result["rows"]:
        old, new = (row["rules"][name] for name in RULES)
        share = old["accuracy"] / 100
        error = 100 * np.sqrt(share * (1 - share) / row["judging"])
        gains.append(new["accuracy"] - old["accuracy"])
        lines.append(
            f"| {row['task']} | {row['trials']} | {row['train_samples']} |"
            f" {old['accuracy']:.1f} ± {error:.1f} | {new['accuracy']:.1f} | {gains[-1]:+.2f} |"
            f" {old['bytes']:,.0f} | {new['bytes']:,.0f} |"
        )
    spread = np.std(gains, ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else float("nan")
    lines += ["", f"Over the tasks, likelihood gains {fmean(gains):+.2f} ± {spread:.2f} points."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every task, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--workdir", type=Path, default=RESULTS.parents[2] / "runs" / "likelihood")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(),
        "epochs": arguments.epochs,
        "draws": arguments.draws,
        "rows": [],
    }
    for name in arguments.tasks:
        result["rows"].append(measured(name, arguments))
        print(result["rows"][-1], flush=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
