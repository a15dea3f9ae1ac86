"""What the scales of low-bit codes may cost: validation accuracy with means and deviations of 32
bits, of 16 bits, and without means.

    python benchmarks/scales.py [--size 32] [--seeds 3] [--epochs 6] [--workdir runs/scales]

Trains connections and adapters of 1 bit on three real tasks, each variant from the same seeds, and
reports the difference to 32 bits seed by seed. Needs the data folder that the task files name.
Writes benchmarks/results/scales.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch
from machine import describe_machine
from pages import mean_difference

from pipeline.adaptation import SelectedIndex, quantiser, values
from pipeline.data import prepare
from pipeline.search.trial import run_trial
from pipeline.selection import read_selection, select_locally, write_selection
from pipeline.specs import Recipe
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, open_inputs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "scales.json"
TASKS = ("cifar10", "mnist", "elpv")
RECIPES: dict[str, dict[str, Any]] = {
    "connections": {
        "connections": {"top_k": 1, "bits": 1},
        "biases": {"bits": 8},
        "head": {"bits": 8},
    },
    "adapter": {"adapter": {"width": 8, "bits": 1}, "head": {"bits": 8}},
}
LEARNING_RATE = {"connections": 0.003, "adapter": 0.003}
VARIANTS = ("32 bits", "16 bits", "16 bits, no mean")


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Train with scales of this kind; only codes of 1 bit lose their mean."""
    has_mean, quantise = not name.endswith("no mean"), values.quantise

    def patched(
        latent_N: torch.Tensor, lengths_G: torch.Tensor, bits: Any, codebook: Any, *_: Any
    ) -> torch.Tensor:
        return quantise(latent_N, lengths_G, bits, codebook, has_mean or bits > 1)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(values, "quantise", patched))
        if name == "32 bits":
            stack.enter_context(
                mock.patch.object(quantiser, "_as_stored", lambda statistic_G: statistic_G)
            )
        yield


def measure(
    inputs: Inputs, recipe: Recipe, selected: SelectedIndex | None, name: str, seed: int
) -> float:
    """Validation accuracy after the last epoch."""
    task = inputs.task.model_copy(update={"seed": seed})
    opened = Inputs(task, inputs.index, inputs.backbone, inputs.splits, inputs.data_folder)
    with variant(name):
        return [score.value for score, _ in run_trial(opened, recipe, selected)][-1]


def rows_of(
    task_name: str, size_px: int, epochs: int, seeds: int, workdir: Path
) -> list[dict[str, Any]]:
    """Every recipe and variant on one task."""
    task = load_task(HERE / "tasks" / f"{task_name}.yaml")
    task = task.model_copy(update={"input": task.input.model_copy(update={"size_px": size_px})})
    prepare(task, workdir / task_name)
    inputs = open_inputs(task, workdir / task_name)
    selection = workdir / f"{task_name}-{size_px}.safetensors"
    if not selection.exists():
        write_selection(select_locally(inputs, 1), selection)
    rows = []
    for name, parts in RECIPES.items():
        recipe = Recipe.model_validate(
            {**parts, "training": {"epochs": epochs, "learning_rate": LEARNING_RATE[name]}}
        )
        selected = read_selection(selection) if recipe.connections else None
        for scales in VARIANTS:
            accuracies = [measure(inputs, recipe, selected, scales, seed) for seed in range(seeds)]
            rows.append(
                {
                    "task": task_name,
                    "recipe": name,
                    "scales": scales,
                    "accuracies": accuracies,
                    "samples": len(inputs.splits["val"]),
                }
            )
            print(rows[-1], flush=True)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, and the mean difference of each variant."""
    machine, rows = result["machine"], result["rows"]
    lines = [
        "# Scales of low-bit codes",
        "",
        (
            f"`{result['command']}` on {machine['cpu']}, torch {machine['torch']}, commit"
            f" {machine['commit']}."
        ),
        "",
        (
            f"One bit a code, {result['epochs']} epochs, {result['seeds']} seeds; validation"
            " accuracy in percent, mean over the seeds. Without means, a"
        ),
        "code stands for a share of the root mean square.",
        "",
        "| task | trained | " + " | ".join(VARIANTS) + " |",
        "|---|---|" + "---|" * len(VARIANTS),
    ]
    found = {(row["task"], row["recipe"], row["scales"]): row["accuracies"] for row in rows}
    pairs = sorted({(task, recipe) for task, recipe, _ in found})
    for pair in pairs:
        lines.append(
            f"| {' | '.join(pair)} | "
            + " | ".join(f"{100 * fmean(found[*pair, scales]):.1f}" for scales in VARIANTS)
            + " |"
        )
    lines.append("")
    for recipe in RECIPES:
        for scales in VARIANTS[1:]:
            differences = [
                100 * (other - one)
                for pair in pairs
                if pair[1] == recipe
                for one, other in zip(found[*pair, VARIANTS[0]], found[*pair, scales], strict=True)
            ]
            lines.append(
                f"- {recipe}, {scales}: {mean_difference(differences, 2)} points beside"
                f" {VARIANTS[0]}, over {len(differences)} pairs."
            )
    return "\n".join([*lines, ""])


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--workdir", type=Path, default=HERE.parent / "runs" / "scales")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for task in TASKS
        for row in rows_of(
            task, arguments.size, arguments.epochs, arguments.seeds, arguments.workdir
        )
    ]
    command = (
        f"python benchmarks/scales.py --size {arguments.size} --seeds {arguments.seeds} --epochs"
        f" {arguments.epochs}"
    )
    result = {
        "command": command,
        "machine": describe_machine(),
        "epochs": arguments.epochs,
        "seeds": arguments.seeds,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
