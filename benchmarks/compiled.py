"""A training step under torch.compile, against the same step as it is.

    python benchmarks/compiled.py [--size 32] [--batch 16] [--precision fp32] [--repeats 15]

The backbone's pass is compiled, and not what writes the trained values into its weights: autograd
cannot be traced through views of the one buffer that all layers' values are written to, and what a
recipe keeps from its first pass on would have everything compiled twice. Both steps take turns;
nothing compiled is taken from earlier runs. Writes benchmarks/results/compiled.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
from machine import describe_machine
from pages import table
from torch._dynamo.utils import counters
from variants import OURS, Setting, backbone_of, make_setting, ours

RESULTS = Path(__file__).parent / "results" / "compiled.json"
NAMES = ("connections K=1", "default recipe")


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone = backbone_of("embedded", arguments.size)
    setting = make_setting(backbone, arguments.batch, arguments.precision, "cpu")
    result = {
        "machine": describe_machine(),
        "arguments": vars(arguments),
        "rows": [measured(name, setting, arguments.repeats) for name in NAMES],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


def measured(name: str, setting: Setting, repeats: int) -> dict[str, Any]:
    """A recipe's step both ways: milliseconds, seconds of the first one that is compiled, and into
    how many graphs it fell.
    """
    torch._dynamo.reset()
    counters.clear()
    steps = [ours(name, setting, OURS[name], compiled).step for compiled in (False, True)]
    steps[0]()
    first_seconds = _seconds(steps[1])
    graphs = counters["stats"]["unique_graphs"]
    taken: list[list[float]] = [[], []]
    for number in range(repeats + 2):
        for step, times in zip(steps, taken, strict=True):
            seconds = _seconds(step)
            times += [seconds] if number >= 2 else []
    plain, compiled = (1000 * statistics.median(times) for times in taken)
    return {
        "variant": name,
        "plain_ms": plain,
        "compiled_ms": compiled,
        "ratio": compiled / plain,
        "first_seconds": first_seconds,
        "graphs": graphs,
    }


def _seconds(step: Any) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    machine, given = result["machine"], result["arguments"]
    columns = ("recipe", "step ms", "compiled, ms", "ratio", "first compiled step, s", "graphs")
    cells = (
        (
            row["variant"],
            f"{row['plain_ms']:.0f}",
            f"{row['compiled_ms']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['first_seconds']:.0f}",
            row["graphs"],
        )
        for row in result["rows"]
    )
    lines = [
        "# Steps under torch.compile",
        "",
        f"{machine['cpu']}, one thread, shared with other work; torch {machine['torch']}; commit"
        f" {machine['commit']}. The embedded ViT at {given['size']} px, batches of"
        f" {given['batch']}, {given['precision']}; medians of {given['repeats']}.",
        "",
        *table(columns, cells),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
