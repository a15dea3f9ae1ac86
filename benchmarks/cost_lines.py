"""How the time of a step grows with K, experts, width and batch, against what the count of
operations predicts.

    python benchmarks/cost_lines.py [--model embedded --size 64 --batch 64] [--precision bf16]
    [--repeats 9]

A line's first point is measured; the others are predicted from it: the products' additional
operations (counted while a step runs) at the rate of large products, and, along the batch,
everything in proportion. Points of all lines run in turn, round by round. Writes
benchmarks/results/cost-lines-<model>-<precision>.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from machine import describe_machine
from torch.utils.flop_counter import FlopCounterMode
from variants import Setting, Variant, backbone_of, connections, make_setting, ours, smoa

from pipeline.specs import Recipe

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
LINES: dict[str, dict[int, Recipe]] = {
    "K": {top_k: connections(top_k) for top_k in (1, 2, 3, 5, 8)},
    "experts": {experts: smoa(experts) for experts in (2, 4, 8, 16)},
    "width": {width: smoa(4, width=width) for width in (4, 8, 16, 32)},
}
BATCHES = (16, 32, 64, 128)


@dataclass
class Point:
    """One measured setting of one line."""

    line: str
    value: int
    variant: Variant
    gflop: float
    images: int


def main() -> None:
    """Measure every line and write the results."""
    arguments = _arguments()
    torch.set_num_threads(1)
    backbone = backbone_of(arguments.model, arguments.size)
    setting = make_setting(backbone, arguments.batch, arguments.precision, "cpu")
    largest = make_setting(backbone, max(BATCHES), arguments.precision, "cpu")
    points = [
        _point(line, value, setting, recipe)
        for line, recipes in LINES.items()
        for value, recipe in recipes.items()
    ]
    points += [
        _point(
            "batch",
            batch,
            replace(largest, images=largest.images[:batch], labels=largest.labels[:batch]),
            connections(1),
        )
        for batch in BATCHES
    ]
    times: list[list[float]] = [[] for _ in points]
    for _ in range(arguments.repeats):
        for point, found in zip(points, times, strict=True):
            started = time.perf_counter()
            point.variant.step()
            found.append(time.perf_counter() - started)
    rows = _rows(
        points,
        [1000 * statistics.median(found) for found in times],
        _product_gflops(arguments.precision),
    )
    result = {
        "machine": describe_machine(),
        "command": "python benchmarks/cost_lines.py " + shlex.join(sys.argv[1:]),
        "rows": rows,
    }
    path = RESULTS / f"cost-lines-{arguments.model}-{arguments.precision}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(_markdown(result, vars(arguments)))
    _draw(rows, path.with_suffix(".png"))
    print(path.with_suffix(".md").read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="embedded", help="`embedded`, or any timm model with random weights"
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    return parser.parse_args()


def _point(line: str, value: int, setting: Setting, recipe: Recipe) -> Point:
    variant = ours(f"{line} {value}", setting, recipe)
    variant.step()
    with FlopCounterMode(display=False) as counter:
        variant.step()
    return Point(line, value, variant, counter.get_total_flops() / 1e9, len(setting.images))


def _product_gflops(precision: str) -> float:
    """Rate of a product of the layers' kind: many tokens by a few hundred columns."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(4096, 256).to(dtype), torch.randn(256, 256).to(dtype)
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * 4096 * 256 * 256 / 1e9 / statistics.median(seconds)


def _rows(points: list[Point], medians_ms: list[float], gflops: float) -> list[dict[str, Any]]:
    rows = []
    for point, median_ms in zip(points, medians_ms, strict=True):
        first = next(index for index, other in enumerate(points) if other.line == point.line)
        more = (point.gflop - points[first].gflop) / gflops * 1000
        share = point.images / points[first].images
        predicted_ms = (
            medians_ms[first] * share if point.line == "batch" else medians_ms[first] + more
        )
        rows.append(
            {
                "line": point.line,
                "value": point.value,
                "gflop": point.gflop,
                "median_ms": median_ms,
                "predicted_ms": predicted_ms,
            }
            | {"deviation": median_ms / predicted_ms - 1}
        )
    return rows


def _markdown(result: dict[str, Any], arguments: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        (
            f"# What a step costs: {arguments['model']} at {arguments['size']} px, batch"
            f" {arguments['batch']}, {arguments['precision']}"
        ),
        "",
        (
            f"`{result['command']}` on {machine['cpu']}, 1 of {machine['cores']} cores, torch"
            f" {machine['torch']}, commit {machine['commit']}; medians of"
        ),
        (
            f"{arguments['repeats']}, one run. K and batch: connections and biases; experts: width"
            " 8; width: 4 experts."
        ),
        "Predicted from each line's first point.",
        "",
        "| line | value | products GFLOP | step ms | predicted ms | deviation % |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        numbers = (
            f"{row['gflop']:.1f} | {row['median_ms']:.1f} | {row['predicted_ms']:.1f} |"
            f" {100 * row['deviation']:+.1f}"
        )
        lines.append(f"| {row['line']} | {row['value']} | {numbers} |")
    lines += ["", *_explanation(result["rows"])]
    return "\n".join(lines) + "\n"


def _explanation(rows: list[dict[str, Any]]) -> list[str]:
    """What the prediction leaves out, with the fixed part of a step by a straight line through the
    batches.
    """
    batches = [row for row in rows if row["line"] == "batch"]
    slope, fixed_ms = statistics.linear_regression(
        [row["value"] for row in batches], [row["median_ms"] for row in batches]
    )
    return [
        (
            f"A step is {fixed_ms:.0f} ms and {slope:.2f} ms an image, by least squares: the fixed"
            " part (a thousand small operations, writing changed"
        ),
        (
            "weights, the optimiser) is in the batch line's first point and makes its prediction"
            " too large. K, experts and width add more than"
        ),
        (
            "their products: gathers of columns, and passes over experts * width hidden units of"
            " every token that compute nothing."
        ),
    ]


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(row["line"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(11, 2.8), constrained_layout=True)
    for axis, name in zip(axes, names, strict=True):
        line = [row for row in rows if row["line"] == name]
        values = [row["value"] for row in line]
        axis.plot(
            values,
            [row["predicted_ms"] for row in line],
            color="0.6",
            linestyle="--",
            label="predicted",
        )
        axis.plot(values, [row["median_ms"] for row in line], marker="o", label="measured")
        axis.set(
            xlabel=name,
            xticks=values,
            ylim=(0, 1.1 * max(max(row["median_ms"], row["predicted_ms"]) for row in line)),
        )
    axes[0].set_ylabel("step, ms")
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
