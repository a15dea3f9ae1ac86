"""What the champion's rule costs in accuracy and saves in bytes against the smallest pack within
half a point of the best, and what it gains by comparing the likelihood of the right classes as well
as the errors: by simulation on the kept trials of other benchmarks, or of any study.

    python benchmarks/champion_likelihood.py NAME=FOLDER... [--draws 200]

A folder is one of trials: `studies` in the work folder of bytes.py, a seed's in that of points.py,
or `studies/<task>-<key>` in that of `taskpack run`. Nothing is trained, and no test set is read. A
draw is a study of the task's trials up to 16 KiB, whose validation set is drawn with replacement;
each rule chooses a pack, and its accuracy is that on the samples that were not drawn, a third on
average. Writes benchmarks/results/champion_likelihood.json and .md.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from champion import OLD, differences, within_half_a_point
from machine import describe_machine

from pipeline.kinds import Metric, Outcomes, metric_named
from pipeline.search.champion import not_worse_than_best
from pipeline.search.trial_record import TrialJournal, TrialRecord
from pipeline.specs import Budget

RESULTS = Path(__file__).parent / "results" / "champion_likelihood.json"
MAX_BYTES, LEVEL = 16 << 10, Budget().level
ACCURACY = metric_named("accuracy", "classification")
Kept = Callable[[TrialRecord], Outcomes]


def not_worse_by(metric: Metric) -> Rule:
    """The smallest pack that is not significantly worse than the best by a metric."""
    return lambda study, kept: next(not_worse_than_best(study, kept, metric, LEVEL))


Rule = Callable[[Sequence[TrialRecord], Kept], TrialRecord]
RULES: dict[str, Rule] = {
    OLD: lambda study, kept: within_half_a_point(study),
    "errors": not_worse_by(replace(ACCURACY, finer=None)),
    "errors and likelihood": not_worse_by(ACCURACY),
}


def kept_trials(folder: Path) -> tuple[list[TrialRecord], dict[str, Outcomes]]:
    """The complete trials within the budget, and their validation outputs."""
    journal, records, kept = TrialJournal(folder), [], {}
    for record in journal.read().values():
        outcomes = journal.outcomes(record.id)
        if record.val_metric is not None and record.size_bytes <= MAX_BYTES and outcomes:
            records.append(record)
            kept[record.id] = outcomes
    return records, kept


def simulate(
    records: Sequence[TrialRecord], kept: Mapping[str, Outcomes], draws: int
) -> dict[str, dict[str, float]]:
    """Mean accuracy in percent, and geometric mean of the bytes, of each rule's choice."""
    rng, samples = np.random.default_rng(0), len(next(iter(kept.values())))
    chosen: dict[str, list[tuple[float, int]]] = {name: [] for name in RULES}
    for _ in range(draws):
        drawn = rng.integers(0, samples, samples)
        left = np.setdiff1d(np.arange(samples), drawn)
        here = {key: _only(each, drawn) for key, each in kept.items()}
        study = [replace(each, val_metric=ACCURACY.value(here[each.id])) for each in records]
        for name, rule in RULES.items():
            pack = rule(study, functools.partial(_of, here))
            accuracy = ACCURACY.value(_only(kept[pack.id], left))
            chosen[name].append((100 * accuracy, pack.size_bytes))
    return {
        name: {
            "accuracy": fmean(value for value, _ in found),
            "bytes": float(np.exp(fmean(np.log(size) for _, size in found))),
        }
        for name, found in chosen.items()
    }


def _of(kept: Mapping[str, Outcomes], record: TrialRecord) -> Outcomes:
    return kept[record.id]


def _only(outcomes: Outcomes, numbers: np.ndarray) -> Outcomes:
    return Outcomes(outcomes.outputs[numbers], outcomes.targets[numbers])


def measured(name: str, folder: Path, draws: int) -> dict[str, Any]:
    """A row of the table."""
    records, kept = kept_trials(folder)
    samples = len(next(iter(kept.values())))
    rules = simulate(records, kept, draws)
    return {"task": name, "trials": len(records), "samples": samples, "rules": rules}


def page(result: dict[str, Any]) -> str:
    """A row per task, and their means."""
    lines = [
        "# The champion by errors, and by likelihood, too",
        "",
        f"`{result['command']}` on {result['machine']['cpu']}, commit",
        f"{result['machine']['commit']}.",
        "",
        f"Each draw is a study of all trials up to {MAX_BYTES >> 10} KiB at level {LEVEL}, its",
        "validation set drawn with replacement; the samples that were not drawn judge. Means of",
        f"{result['draws']} draws; ± is the standard error of one pack's accuracy on all samples,",
        "or of the mean over the tasks. The product's rule compares errors and likelihood; the old",
        "one took the smallest pack within 0.5 points of the best.",
        "",
        "| task | trials | samples | % by the old rule | by errors, points | by likelihood, too,"
        " points | bytes by the old rule | by errors | by likelihood, too |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        old, *others = (row["rules"][name] for name in RULES)
        share = old["accuracy"] / 100
        error = 100 * np.sqrt(share * (1 - share) / row["samples"])
        points = [f"{each['accuracy'] - old['accuracy']:+.2f}" for each in others]
        sizes = [f"{each['bytes']:,.0f}" for each in (old, *others)]
        cells = [row["task"], str(row["trials"]), str(row["samples"])]
        cells += [f"{old['accuracy']:.1f} ± {error:.1f}", *points, *sizes]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| rule | points against the old rule | bytes saved |", "|---|---|---|"]
    lines += differences(result["rows"], list(RULES)[1:], "accuracy")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate every study, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--draws", type=int, default=200)
    arguments = parser.parse_args()
    named = [each.partition("=")[::2] for each in arguments.studies]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(),
        "draws": arguments.draws,
        "rows": [measured(name, Path(folder), arguments.draws) for name, folder in named],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
