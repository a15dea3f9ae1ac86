"""Real data through the whole pipeline: the house recipe under a byte budget against a linear probe
trained for as many epochs.

    python benchmarks/real_tasks.py [--workdir runs/benchmarks] [--tasks mnist cifar10 elpv]

Needs the data folder that the task files name. Writes benchmarks/results/real_tasks.json with every
trial, and real_tasks.md from it. Interrupt it, start it again: it goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from machine import describe_machine
from rich.console import Console

import pipeline
from pipeline.cli.progress import BatchProgress
from pipeline.specs.yaml_files import read_mapping

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "real_tasks.json"


def run(tasks: list[Path], workdir: Path, overrides: dict[str, Any]) -> list[dict[str, Any]]:
    """Run tasks; one row each with the registered numbers and all trials."""
    loaded = pipeline.load_tasks(tasks, overrides=overrides)
    with BatchProgress(Console(), [task.name for task in loaded]) as progress:
        outcomes = pipeline.run(loaded, workdir=workdir, on_progress=progress.update)
    rows = []
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
        assert outcome.registered is not None
        file_bytes = pipeline.fetch(f"{outcome.task}@champion", workdir=workdir).stat().st_size
        rows.append(
            {
                "task": outcome.task,
                "metrics": outcome.registered.metrics,
                "params": outcome.registered.params,
                "registered_bytes": outcome.registered.size_bytes,
                "file_bytes": file_bytes,
                "champion": outcome.champion_id,
                "trials": [trial.row() for trial in outcome.trials],
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    machine = result["machine"]
    lines = [
        "# Real tasks",
        "",
        (
            f"`python benchmarks/real_tasks.py` on {machine['cpu']}, {machine['cores']} cores,"
            f" torch {machine['torch']}, commit {machine['commit']}."
        ),
        "",
        (
            "Embedded backbone (ViT, width 192, depth 6, 2.76 M parameters) at 64 px, 1000 training"
            " images, budget 64 KiB, 15 epochs for both recipes."
        ),
        "Test sets are read once, by the pack reloaded from its file. Accuracies in percent.",
        "",
        (
            "| task | recipe | test | validation | bytes registered | bytes of the file | trained"
            " values | search s | fit s |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(row, recipe) for recipe in ("house", "linear") for row in result[recipe]),
    ]
    for recipe in ("house", "linear"):
        for row in result[recipe]:
            lines += ["", f"## {row['task']}, {recipe}: all trials", "", *_trials(row)]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any], recipe: str) -> str:
    metrics = row["metrics"]
    test = f"{100 * metrics['test_metric']:.1f} ± {100 * metrics['test_metric_stderr']:.1f}"
    numbers = (
        row["registered_bytes"],
        row["file_bytes"],
        *(round(metrics[key]) for key in ("trained_values", "search_seconds", "fit_seconds")),
    )
    return (
        f"| {row['task']} | {recipe} | {test} | {100 * metrics['val_metric']:.1f} |"
        f" {' | '.join(map(str, numbers))} |"
    )


def _trials(row: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(name for trial in row["trials"] for name in trial["point"]))
    lines = [
        "| " + " | ".join([*names, "bytes", "validation %", "epochs", "s", "state"]) + " |",
        "|" + "---|" * (len(names) + 5),
    ]
    for trial in sorted(row["trials"], key=lambda trial: (trial["size_bytes"], trial["id"])):
        metric = "" if not trial["curve"] else f"{100 * trial['curve'][-1]:.1f}"
        state = "**champion**" if trial["id"] == row["champion"] else trial["state"]
        cells = [
            *(str(trial["point"].get(name, "")) for name in names),
            str(trial["size_bytes"]),
            metric,
            str(trial["epochs"] or ""),
        ]
        lines.append("| " + " | ".join([*cells, f"{trial['seconds']:.0f}", state]) + " |")
    return lines


def main() -> None:
    """Run both recipes on every task and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--tasks", nargs="+", default=["mnist", "cifar10", "elpv"])
    arguments = parser.parse_args()
    files = [HERE / "tasks" / f"{name}.yaml" for name in arguments.tasks]
    linear = {
        "recipe": read_mapping(HERE / "tasks" / "linear.yaml"),
        "search": HERE / "tasks" / "linear_search.yaml",
    }
    result = {
        "machine": describe_machine(),
        "house": run(files, arguments.workdir / "house", {}),
        "linear": run(files, arguments.workdir / "linear", linear),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
