"""One study on unbalanced data, scored by three metrics from the validation outputs that its trials
keep: no trial is trained again.

    python benchmarks/unbalanced.py [--workdir runs/unbalanced] [--epochs 6]

Solar cells in four grades of defect (elpv); a fifth of them is in the two rarest grades. Needs the
data folder that the task file names. Writes benchmarks/results/unbalanced.json and .md. Interrupt
it and start it again: it continues.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine

import pipeline
from pipeline.kinds import Outcomes
from pipeline.kinds.metrics import metric_named, score
from pipeline.search.trial_record import TrialJournal

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "unbalanced.json"
METRICS = ("accuracy", "balanced_accuracy", "f1")


def scores(outcomes: Outcomes) -> dict[str, list[float]]:
    """Value and standard error in percent, by metric."""
    found = {name: score(metric_named(name, "classification"), outcomes) for name in METRICS}
    return {name: [100 * each.value, 100 * each.standard_error] for name, each in found.items()}


def measure(workdir: Path, epochs: int) -> list[dict[str, Any]]:
    """A row per trial, and one for the model that always answers the most frequent class."""
    overrides = {
        "recipe": {"preset": "default", "training": {"epochs": epochs}},
        "search": {"bits": [1, 4], "learning_rate": [0.003, 0.008, 0.03]},
    }
    tasks = pipeline.load_tasks([HERE / "tasks" / "elpv.yaml"], overrides=overrides)
    (outcome,) = pipeline.run(tasks, workdir=workdir)
    if outcome.error is not None:
        raise outcome.error
    (folder,) = workdir.glob("studies/elpv-*/trials")
    journal, rows = TrialJournal(folder), []
    for trial in outcome.trials:
        outcomes = journal.outcomes(trial.id)
        if trial.state == "complete" and outcomes is not None:
            rows.append({"point": trial.point, "bytes": trial.size_bytes, **scores(outcomes)})
            targets = outcomes.targets
    constant = np.eye(4)[np.full(len(targets), np.bincount(targets).argmax())]
    rows.append({"point": {}, "bytes": 0, **scores(Outcomes(constant, targets))})
    return rows


def page(result: dict[str, Any]) -> str:
    """The table of a result: the best of each column is bold."""
    machine, rows = result["machine"], result["rows"]
    best = {name: max(row[name][0] for row in rows) for name in METRICS}
    lines = [
        "# Metrics on unbalanced data",
        "",
        f"`python benchmarks/unbalanced.py` on {machine['cpu']}, torch {machine['torch']}, commit",
        f"{machine['commit']}. {result['epochs']} epochs on the embedded backbone at 64 px.",
        "",
        "Validation in percent ± standard error, from the outputs that the trials of one study",
        "kept; bold is the best of a metric.",
        "",
        "| bits | learning rate | bytes | " + " | ".join(METRICS) + " |",
        "|---|---|---:|" + "---:|" * len(METRICS),
    ]
    for row in sorted(rows, key=lambda row: row["bytes"]):
        shown = [
            f"{'**' if value == best[name] else ''}{value:.1f} ± {error:.1f}"
            f"{'**' if value == best[name] else ''}"
            for name in METRICS
            for value, error in [row[name]]
        ]
        point = row["point"] or {"bits": "always the most frequent class", "learning_rate": ""}
        cells = [str(point["bits"]), str(point["learning_rate"]), f"{row['bytes']:,}", *shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the study, score its trials, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=HERE.parent / "runs" / "unbalanced")
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    result = {
        "machine": describe_machine(),
        "epochs": arguments.epochs,
        "rows": measure(arguments.workdir, arguments.epochs),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
