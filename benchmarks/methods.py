"""The table of all methods: accuracy against bytes on three real tasks, one protocol, and what the
papers claim as measured here.

    python benchmarks/methods.py [--size 32] [--epochs 6] [--seeds 3] [--fraction 1] [--workdir
    runs/methods]

Needs the data folder that the task files name. The tasks' own settings, `--size 64 --epochs 15`,
take ten times as long. Interrupt it, start it again: it goes on. Writes
benchmarks/results/methods/: comparison.csv, comparison.md and a figure a task.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from machine import describe_machine
from pages import mean_difference
from rich.console import Console

from pipeline.cli.progress import BatchProgress
from pipeline.driver.compare import compare_methods
from pipeline.reports.comparison import write_comparison
from pipeline.reports.comparison_row import Comparison
from pipeline.specs.catalogue import load_methods, tasks_to_compare

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "methods"
TASKS = ("cifar10", "mnist", "elpv")
SELECTORS = ("gradient_layer_4bit", "gradient_network_4bit", "magnitude_4bit", "random_4bit")
METHODS = (
    *(
        "full",
        "linear",
        "bias",
        "lora_32bit",
        "adaptformer_32bit",
        "adaptformer_4bit",
        "adaptformer_1bit",
        "smoa_32bit",
        "smoa_1bit",
    ),
    *("adaptformer_x_1bit", "gps_32bit", "gps_4bit", "gps_1bit", "gps_smoa", *SELECTORS),
)
CLAIMS: Mapping[str, Sequence[tuple[str, str]]] = {
    "1 bit loses little against 32 bits (Binary Adapter)": [
        (f"{method}_1bit", f"{method}_32bit") for method in ("adaptformer", "smoa", "gps")
    ],
    "gradients neuron by neuron beat other selections (GPS)": [
        ("gps_4bit", other) for other in SELECTORS
    ],
}


def claims(rows: Sequence[Comparison]) -> list[str]:
    """For each claim a table: differences of test accuracy in points, seed by seed, by task and
    over all tasks.
    """
    found = {(row.task, row.method): row.test_metrics for row in rows}
    tasks = list(dict.fromkeys(row.task for row in rows))
    lines = []
    for claim, pairs in CLAIMS.items():
        lines += [
            "",
            f"**{claim}.**",
            "",
            f"| difference | {' | '.join(tasks)} | mean |",
            "|" + "---|" * (len(tasks) + 2),
        ]
        for one, other in pairs:
            per_task = [_differences(found[task, one], found[task, other]) for task in tasks]
            means = [fmean(each) for each in per_task]
            cells = [*map(mean_difference, per_task), f"{fmean(means):+.1f}"]
            lines.append(f"| {one} - {other} | {' | '.join(cells)} |")
    return lines


def _differences(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    return [100 * (one - other) for one, other in zip(ones, others, strict=True)]


def notes(rows: Sequence[Comparison], arguments: argparse.Namespace) -> str:
    """What stands above the tables: how they were made, and the claims."""
    machine = describe_machine()
    command = (
        f"python benchmarks/methods.py --size {arguments.size} --epochs {arguments.epochs} "
        f"--seeds {arguments.seeds} --fraction {arguments.fraction:g}"
    )
    lines = [
        (
            f"`{command}` on {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']},"
            f" commit {machine['commit']}."
        ),
        "",
        (
            "Embedded backbone (ViT, width 192, depth 6), 1000 training images a task. To fit two"
            f" cores, images are of {arguments.size} px and training"
        ),
        (
            f"takes {arguments.epochs} epochs; the task files say 64 px and 15 epochs, which"
            " `--size 64 --epochs 15` runs. Every method is tuned on"
        ),
        f"validation over {arguments.fraction:.4g} of its search space and fitted once per seed.",
        "Seconds are of a machine that other work shared.",
        "",
        "Differences of test accuracy in points, mean ± standard error over the seeds:",
        *claims(rows),
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--workdir", type=Path, default=HERE.parent / "runs" / "methods")
    arguments = parser.parse_args()
    _, tasks = tasks_to_compare(
        [HERE / "tasks" / f"{name}.yaml" for name in TASKS], None, arguments.epochs
    )
    tasks = [
        task.model_copy(update={"input": task.input.model_copy(update={"size_px": arguments.size})})
        for task in tasks
    ]
    with BatchProgress(Console(), list(TASKS)) as progress:
        rows = compare_methods(
            tasks,
            load_methods(METHODS),
            arguments.workdir,
            seeds=arguments.seeds,
            fraction=arguments.fraction,
            on_progress=progress.update,
        )
    write_comparison(rows, RESULTS, notes=notes(rows, arguments))


if __name__ == "__main__":
    main()
