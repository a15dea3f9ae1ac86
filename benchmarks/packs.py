"""What packs cost: positions against their entropy, files against other formats, ViT-B and ViT-L
byte by byte, time, and what sharing would save.

    python benchmarks/packs.py [--workdir runs/benchmarks/packs]

Needs the data folder that benchmarks/tasks/*.yaml name, and the extra `bench`. Writes
benchmarks/results/packs.json, packs.md and packs.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from machine import describe_machine
from packs_figure import draw
from packs_page import markdown
from packs_selected import open_task, selected_of
from packs_sharing import sharing_row
from packs_simulated import bottleneck_rows, simulated_rows, time_row

from pipeline.adaptation import RankedIndices
from pipeline.adaptation.packing import SizePlanner
from pipeline.packs import encode_positions, thresholds
from pipeline.specs import Recipe
from pipeline.training import Inputs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "packs.json"
REAL = [HERE / "tasks" / f"{name}.yaml" for name in ("cifar10", "mnist", "elpv")]
DEMO = [
    HERE.parent / "tasks" / "demo" / f"{name}.yaml"
    for name in ("digits", "counting", "orientation")
]


def position_rows(
    tasks: Mapping[str, tuple[Inputs, dict[str, RankedIndices]]],
) -> list[dict[str, Any]]:
    """Coded positions against entropy and fixed width."""
    rows = []
    for name, (inputs, ranked) in tasks.items():
        for top_k in (1, 3):
            selected = selected_of(ranked, inputs, top_k)
            coded = len(encode_positions(selected.places, selected.shapes))
            rows.append(
                {
                    "task": name,
                    "K": top_k,
                    "positions": selected.count,
                    "coded_bytes": coded,
                    "bits_a_position": 8 * coded / selected.count,
                    "entropy_bytes": selected.entropy_bytes,
                    "to_entropy": coded / selected.entropy_bytes,
                    "fixed_bytes": selected.fixed_bytes,
                    "to_fixed": coded / selected.fixed_bytes,
                }
            )
    return rows


def file_rows(tasks: Mapping[str, tuple[Inputs, dict[str, RankedIndices]]]) -> list[dict[str, Any]]:
    """GPS at K = 1 and 1 bit, head at 1 bit: the whole file against the bound of positions and
    codes.
    """
    recipe = Recipe.model_validate({"connections": {"top_k": 1, "bits": 1}, "head": {"bits": 1}})
    rows = []
    for name, (inputs, ranked) in tasks.items():
        classes = inputs.index.classes
        selected = selected_of(ranked, inputs, 1)
        spent = SizePlanner(inputs.task, inputs.backbone, classes, ranked).ledger(recipe)
        head_codes = len(classes) * inputs.backbone.width / 8 + 2 * len(classes)
        bound = selected.entropy_bytes + selected.count / 8 + head_codes
        rows.append(
            {
                "task": name,
                "ledger": spent,
                "file_bytes": sum(spent.values()),
                "bound_bytes": bound,
                "limit_bytes": 1.03 * bound + 1024,
            }
        )
    return rows


def format_rows(
    tasks: Mapping[str, tuple[Inputs, dict[str, RankedIndices]]],
) -> list[dict[str, Any]]:
    """K = 1 of one task in other sparse layouts, plain and under zstd; values are normal."""
    name, (inputs, ranked) = next(iter(tasks.items()))
    selected = selected_of(ranked, inputs, 1)
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape.count).astype(np.float32) for shape in selected.shapes]
    pairs = list(zip(selected.places, selected.shapes, strict=True))
    index32 = [
        np.stack([places // shape.columns, places % shape.columns]).astype(np.int32).tobytes()
        for places, shape in pairs
    ]
    flat32 = [places.astype(np.int32).tobytes() for places in selected.places]
    layouts = {
        "SHiRA in PEFT: float32 value, int32 row and column": [
            part + value.tobytes() for part, value in zip(index32, values, strict=True)
        ],
        "Super-Tuning: float32 value, int32 place": [
            part + value.tobytes() for part, value in zip(flat32, values, strict=True)
        ],
        "float16 COO: float16 value, int32 place": [
            part + value.astype(np.float16).tobytes()
            for part, value in zip(flat32, values, strict=True)
        ],
    }
    rows: list[dict[str, Any]] = []
    for layout, parts in layouts.items():
        content = b"".join(parts)
        packed = zstandard.ZstdCompressor(level=19).compress(content)
        rows += [
            {"format": layout, "bytes": len(content)},
            {"format": f"{layout}; zstd -19", "bytes": len(packed)},
        ]
    for bits in (16, 8, 4, 1):
        recipe = Recipe.model_validate({"connections": {"top_k": 1, "bits": bits}})
        spent = SizePlanner(inputs.task, inputs.backbone, inputs.index.classes, ranked).ledger(
            recipe
        )
        rows.append(
            {
                "format": f"pack at {bits} bit{'s' if bits > 1 else ''}: positions and values",
                "bytes": spent["positions"] + spent["values"],
            }
        )
    return [{**row, "task": name, "bytes_a_value": row["bytes"] / selected.count} for row in rows]


def code_rows() -> list[dict[str, Any]]:
    """What an entropy coder could save on the codes of normal values: 1 - entropy / bits."""
    rows = []
    for bits in range(1, 9):
        below = np.array(
            [0.0, *(statistics.NormalDist().cdf(float(border)) for border in thresholds(bits)), 1.0]
        )
        share = np.diff(below)
        rows.append({"bits": bits, "saved_share": 1 + float((share * np.log2(share)).sum()) / bits})
    return rows


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks/packs"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = time_row()
    tasks = {path.stem: open_task(path, arguments.workdir) for path in (*REAL, *DEMO)}
    real = {path.stem: tasks[path.stem] for path in REAL}
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "positions": position_rows(real),
        "files": file_rows(real),
        "formats": format_rows(real),
        "bottleneck": bottleneck_rows(),
        "time": clock,
        "simulated": simulated_rows(),
        "codes": code_rows(),
        "sharing": [sharing_row(tasks, top_k) for top_k in (1, 3)],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))
    draw(result["simulated"], RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
