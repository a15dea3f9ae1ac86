"""How flat the minimum is that an adapter trains to: accuracy when Gaussian noise is added to its
weights (Binary Adapter, arXiv 2307.16867).

    python benchmarks/flat_minima.py [--task tasks/demo/digits.yaml] [--bits 32 4 1] [--draws 5]

Noise is relative: its standard deviation is a share of that of each matrix, added to the weights as
the forward pass uses them. Where accuracy holds up to shares of the size of a code's rounding
error, few bits cost little. Trains on train, measures on validation; writes benchmarks/results/
flat_minima.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from machine import describe_machine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from runs import train

from pipeline.adaptation import AdaptedModel, attach
from pipeline.data import Reader, Split, prepare
from pipeline.kinds import kind_named, metric_named
from pipeline.specs import Adapter, Head, Recipe
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, evaluate, open_inputs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "flat_minima.json"
SHARES = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


@torch.no_grad()
def accuracies_under_noise(
    model: AdaptedModel, reader: Reader, split: Split, share: float, draws: int, seed: int = 0
) -> list[float]:
    """Accuracy for each of `draws` noises on the adapters, of a standard deviation `share` times
    each matrix's; the model ends without noise.
    """
    generator = torch.Generator().manual_seed(seed)
    clean = {tensor: value.clone() for tensor, value in model.values().items()}
    accuracies = []
    for _ in range(draws):
        noisy = {
            tensor: (
                value
                + share
                * value.std(dim=(-2, -1), keepdim=True)
                * torch.randn(value.shape, generator=generator)
                if tensor.part == "adapters"
                else value
            )
            for tensor, value in clean.items()
        }
        model.values.load_stored(noisy)
        outcomes = evaluate(model, reader, split, kind_named("classification"))
        accuracies.append(metric_named("accuracy", "classification").value(outcomes))
    model.values.load_stored(clean)
    return accuracies


def measure(inputs: Inputs, bits: int, draws: int) -> dict[str, Any]:
    """Train a parallel adapter at `bits`, then accuracy by share of noise."""
    task = inputs.task
    recipe = Recipe(
        adapter=Adapter.model_validate({"width": 8, "bits": bits}),
        head=Head(bits=32),
        training=task.recipe.training,
    )
    model = attach(inputs.backbone, recipe, len(inputs.index.classes), seed=task.seed)
    train(model, inputs, recipe, task.seed)
    reader, split = inputs.reader("val"), inputs.splits["val"]
    return {
        "bits": bits,
        "samples": len(split),
        "accuracies": {
            share: accuracies_under_noise(model, reader, split, share, draws) for share in SHARES
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    machine = result["machine"]
    lines = [
        "# Accuracy under noise on a trained adapter",
        "",
        (
            f"`python benchmarks/flat_minima.py` on {machine['cpu']}, torch {machine['torch']},"
            f" commit {machine['commit']}."
        ),
        "",
        (
            f"Task {result['task']}: a bottleneck of width 8 beside every MLP, {result['epochs']}"
            " epochs, head at 32 bits and without noise. Validation"
        ),
        (
            f"accuracy in percent, mean ± standard deviation over {result['draws']} draws; noise as"
            " a share of each matrix's standard deviation."
        ),
        "",
        "| bits | " + " | ".join(f"{share:g}" for share in SHARES) + " |",
        "|" + "---|" * (len(SHARES) + 1),
    ]
    for row in result["rows"]:
        cells = [
            f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"
            for values in row["accuracies"].values()
        ]
        lines.append(f"| {row['bits']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![validation accuracy against noise](flat_minima.png)", ""])


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against the share of noise, one line a bit width."""
    figure = Figure(figsize=(6.4, 4.2), dpi=160, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    for row, mark in zip(rows, "os^Dv", strict=False):
        means, errors = zip(
            *((100 * fmean(values), 100 * stdev(values)) for values in row["accuracies"].values()),
            strict=True,
        )
        axes.errorbar(
            SHARES,
            means,
            yerr=errors,
            marker=mark,
            capsize=3,
            label=f"{row['bits']} bit" + "s" * (row["bits"] > 1),
        )
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xticks(SHARES, [f"{share:g}" for share in SHARES])
    axes.set_xlabel("noise, as a share of each matrix's standard deviation")
    axes.set_ylabel("validation accuracy (%)")
    axes.grid(True, color="#E4E4E4")
    axes.legend(frameon=False)
    canvas.print_png(path, metadata={"Software": None})


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", type=Path, default=HERE.parent / "tasks" / "demo" / "digits.yaml")
    parser.add_argument("--bits", type=int, nargs="+", default=[32, 4, 1])
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task(arguments.task)
    with tempfile.TemporaryDirectory() as folder:
        prepare(task, Path(folder) / "data")
        inputs = open_inputs(task, Path(folder) / "data")
        rows = [measure(inputs, bits, arguments.draws) for bits in arguments.bits]
    result = {
        "machine": describe_machine(),
        "task": task.name,
        "epochs": task.recipe.training.epochs,
        "draws": arguments.draws,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))
    draw(rows, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
