"""The default search space by backbone, number of classes and budget: what is tried, and how large
its packs are, planned without training.

    python benchmarks/dial.py

The shapes of ViT-S/16, ViT-B/16 and ViT-L/16, with random weights: sizes depend on them only where
connections are stored, and then an upper bound over all selections counts. Writes
benchmarks/results/dial.json and .md.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from machine import describe_machine
from packs_simulated import simulated_pack

from pipeline.adaptation.packing import SizePlanner
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.inputs.preset import on_backbone
from pipeline.packs import ledger
from pipeline.specs import Backbone, Input, Recipe, Task

SIMULATED = {"vit_base_patch16_224": "ViT-B/16", "vit_large_patch16_224": "ViT-L/16"}
RESULTS = Path(__file__).parent / "results" / "dial.json"
BACKBONES = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
CLASSES = (10, 100, 1000)
BUDGETS = tuple(1024 * kib for kib in (2, 4, 8, 16, 32, 64))
GPS: dict[str, Any] = {
    "connections": {"top_k": 1, "bits": 1},
    "biases": {"bits": 1},
    "head": {"bits": 1},
}


def opened(name: str) -> LoadedBackbone:
    """A backbone of these shapes, at a small input: sizes do not depend on it."""
    spec = Backbone(model=name, arguments={"img_size": 32}, weights="random")
    return load_backbone(spec, Input())


def task_of(backbone: LoadedBackbone, max_bytes: int) -> Task:
    """A task without a recipe or search."""
    return Task.model_validate(
        {
            "name": "planned",
            "data": {"format": "digits"},
            "backbone": backbone.spec.model_dump(),
            "budget": {"max_bytes": max_bytes},
        }
    )


def spaces(name: str) -> list[dict[str, Any]]:
    """A row per number of classes and budget."""
    backbone, rows = opened(name), []
    for count in CLASSES:
        classes = [f"class {number}" for number in range(count)]
        for max_bytes in BUDGETS:
            started = time.perf_counter()
            task, _ = on_backbone(task_of(backbone, max_bytes), backbone, classes)
            seconds = time.perf_counter() - started
            planner = SizePlanner(task, backbone, classes)
            points = list(task.search.points())
            sizes = [planner.largest_bytes(task.search.recipe(task.recipe, p)) for p in points]
            rows.append(
                {
                    "backbone": name,
                    "classes": count,
                    "max_bytes": max_bytes,
                    "smallest": min(sizes),
                    "largest": max(sizes),
                    "widest": points[sizes.index(max(sizes))],
                    "trials": len(points),
                    "seconds": seconds,
                }
            )
    return rows


def gps(name: str) -> dict[str, Any]:
    """Bounds of a pack of one connection per neuron and the biases, all at 1 bit, 100 classes; and
    its size with a simulated selection.
    """
    backbone, classes = opened(name), [f"class {number}" for number in range(100)]
    planner = SizePlanner(task_of(backbone, 65536), backbone, classes)
    recipe = Recipe.model_validate(GPS)
    simulated = SIMULATED.get(name)
    pack = simulated and simulated_pack(simulated, top_k=1, bits=1, experts=0, bias_bits=1)
    return {
        "backbone": name,
        "at_least": planner.size_bytes(recipe),
        "simulated": sum(ledger(pack).values()) if pack else None,
        "at_most": planner.largest_bytes(recipe),
    }


def page(result: dict[str, Any]) -> str:
    """The tables."""
    machine = result["machine"]
    lines = [
        "# The default search space",
        "",
        f"`python benchmarks/dial.py` on {machine['cpu']}, torch {machine['torch']}, commit",
        f"{machine['commit']}. Bytes of the smallest and the largest pack that is tried, and the",
        "recipe of the latter. Where nothing fits, the smallest pack is named in an error.",
        "",
        "| backbone | classes | budget | trials | smallest | largest | its recipe |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        recipe = ", ".join(f"{axis} {value}" for axis, value in row["widest"].items())
        fits = row["smallest"] <= row["max_bytes"]
        sizes = f"{row['smallest']:,} | {row['largest']:,}" if fits else f"{row['smallest']:,} | -"
        lines.append(
            f"| {row['backbone']} | {row['classes']:,} | {row['max_bytes'] // 1024} KiB |"
            f" {row['trials'] if fits else 0} | {sizes} | {recipe if fits else 'nothing fits'} |"
        )
    longest = max(row["seconds"] for row in result["rows"])
    lines += [
        "",
        f"Deriving a space took at most {longest:.0f} s, beside other work.",
        "",
        "One connection per neuron and all biases, everything at 1 bit, 100 classes, in bytes over",
        "all selections, and with one in which columns are as popular as those measured on the",
        "embedded backbone:",
        "",
        "| backbone | at least | as on the embedded | at most |",
        "|---|---|---|---|",
        *(
            f"| {row['backbone']} | {row['at_least']:,} |"
            f" {format(row['simulated'], ',') if row['simulated'] else ''} |"
            f" {row['at_most']:,} |"
            for row in result["gps"]
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Plan, write the page."""
    rows = [row for name in BACKBONES for row in spaces(name)]
    result = {"machine": describe_machine(), "rows": rows, "gps": [gps(n) for n in BACKBONES]}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
