"""Where selections lie in the network, and how much tasks have in common: every criterion at every
level, on three real tasks.

    python benchmarks/selections.py [--tasks cifar10 mnist elpv] [--top-k 1]

Embedded ViT at 64 px, whole training splits. Also: the seconds each criterion takes, the bytes of
its positions in a pack, and how many of the gradient's connections other criteria choose. Needs the
data folder that the task files name. Writes benchmarks/results/selections.json and .md, and the
figures selections-blocks.png and selections-overlap.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from selection_overlap import chance_overlap, draw_overlaps, draw_shares, overlap, share_by_block

from pipeline.adaptation import SelectedIndex
from pipeline.adaptation.packing import SizePlanner
from pipeline.adaptation.sites import weight_shapes
from pipeline.data import prepare
from pipeline.selection import stage
from pipeline.specs import Connections, Recipe, Selection
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, open_inputs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "selections.json"
Made = tuple[Inputs, SelectedIndex, float]
LEVELS = ("neuron", "layer", "network")
CRITERIA: dict[str, dict[str, Any]] = {
    "gradient": {},
    "cross-entropy": {"loss": "cross_entropy"},
    "activation": {"criterion": "activation"},
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random"},
}


def main() -> None:
    """Select, count, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["cifar10", "mnist", "elpv"])
    parser.add_argument("--top-k", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        inputs = {name: open_task(name, Path(folder) / name) for name in arguments.tasks}
        made = {name: select_all(each, arguments.top_k) for name, each in inputs.items()}
        result = {
            "machine": describe_machine(),
            "arguments": vars(arguments),
            "rows": rows(inputs, made, arguments.top_k),
        }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))
    draw(result)
    print(markdown(result))


def open_task(name: str, folder: Path) -> Inputs:
    """A benchmark task, prepared in `folder`."""
    task = load_task(HERE / "tasks" / f"{name}.yaml")
    prepare(task, folder)
    return open_inputs(task, folder)


def select_all(inputs: Inputs, top_k: int) -> dict[tuple[str, str], Made]:
    """The task with each selection, what it selects, and the seconds that took: those of its
    passes, which levels share, and of its ranking.
    """
    made: dict[tuple[str, str], Made] = {}
    for criterion, chosen in CRITERIA.items():
        started = time.perf_counter()
        sums = stage._sums(_with(inputs, chosen), stage._numbered_batches(inputs))
        passes = time.perf_counter() - started
        for level in LEVELS:
            each, started = _with(inputs, {**chosen, "level": level}), time.perf_counter()
            selected = stage._ranked(each, dict(sums), top_k)
            made[criterion, level] = each, selected, passes + time.perf_counter() - started
    return made


def _with(inputs: Inputs, chosen: dict[str, Any]) -> Inputs:
    return replace(
        inputs, task=inputs.task.model_copy(update={"selection": Selection.model_validate(chosen)})
    )


def rows(
    inputs: dict[str, Inputs], made: dict[str, dict[tuple[str, str], Made]], top_k: int
) -> list[dict[str, Any]]:
    """One row a criterion and level."""
    names, any_inputs = list(inputs), next(iter(inputs.values()))
    entries = {
        name: rows * columns
        for name, (rows, columns) in weight_shapes(any_inputs.backbone.model).items()
    }
    found = []
    for criterion, level in itertools.product(CRITERIA, LEVELS):
        by_task = {name: made[name][criterion, level] for name in names}
        selected = {name: by_task[name][1] for name in names}
        pairs = list(itertools.combinations(names, 2))
        found.append(
            {
                "criterion": criterion,
                "level": level,
                "shares": {name: share_by_block(selected[name], top_k) for name in names},
                "overlaps": [
                    [overlap(selected[a], selected[b], top_k) for b in names] for a in names
                ],
                "mean_overlap": mean(overlap(selected[a], selected[b], top_k) for a, b in pairs),
                "chance_overlap": mean(
                    chance_overlap(selected[a], selected[b], entries, top_k) for a, b in pairs
                ),
                "overlap_with_gradient": mean(
                    overlap(selected[name], made[name]["gradient", level][1], top_k)
                    for name in names
                ),
                "position_bytes": {
                    name: position_bytes(by_task[name][0], selected[name], top_k) for name in names
                },
                "seconds": mean(by_task[name][2] for name in names),
            }
        )
    return found


def mean(values: Any) -> float:
    """Of any numbers; 0 of none."""
    listed = list(values)
    return sum(listed) / max(1, len(listed))


def position_bytes(inputs: Inputs, selected: SelectedIndex, top_k: int) -> int:
    """What the positions take in a pack."""
    planner = SizePlanner(inputs.task, inputs.backbone, inputs.index.classes, selected)
    return planner.ledger(Recipe(connections=Connections(top_k=top_k))).get("positions", 0)


def draw(result: dict[str, Any]) -> None:
    """Both figures, of the gradient's selections: shares of the first task, overlaps of all."""
    gradient = {row["level"]: row for row in result["rows"] if row["criterion"] == "gradient"}
    tasks, top_k = result["arguments"]["tasks"], result["arguments"]["top_k"]
    shares = {f"by {level}": row["shares"][tasks[0]] for level, row in gradient.items()}
    draw_shares(
        shares,
        RESULTS.with_name("selections-blocks.png"),
        title=f"{tasks[0]}: where the gradient's connections lie, K = {top_k}",
    )
    matrices = {f"by {level}": row["overlaps"] for level, row in gradient.items()}
    path = RESULTS.with_name("selections-overlap.png")
    draw_overlaps(
        matrices,
        tasks,
        path,
        title=f"Connections that two tasks have in common (%), gradient, K = {top_k}",
    )


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    machine, arguments = result["machine"], result["arguments"]
    tasks = ", ".join(arguments["tasks"])
    lines = [
        "# What selections choose",
        "",
        (
            f"`python benchmarks/selections.py` on {machine['cpu']}, one thread, torch"
            f" {machine['torch']}, commit {machine['commit']}."
        ),
        "",
        (
            f"Embedded ViT (width 192, depth 6) at 64 px, whole training splits of {tasks}, K ="
            f" {arguments['top_k']}. Seconds and overlaps are means"
        ),
        (
            "over tasks or pairs of tasks; by chance: with as many places of each layer drawn at"
            " random. Seconds are of one run, beside other work."
        ),
        "",
        (
            "| criterion | level | overlap of tasks % | by chance % | overlap with the gradient's %"
            " | position bytes | s |"
        ),
        "|---|---|---|---|---|---|---|",
        *(_row(row) for row in result["rows"]),
        "",
        f"Share of the chosen connections in each block, {arguments['tasks'][0]}, in %:",
        "",
        *_shares(result["rows"], arguments["tasks"][0]),
        "",
        "![Shares by block](selections-blocks.png)",
        "",
        "![Overlaps between tasks](selections-overlap.png)",
    ]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    percents = " | ".join(
        f"{100 * row[key]:.1f}"
        for key in ("mean_overlap", "chance_overlap", "overlap_with_gradient")
    )
    sizes = sorted(row["position_bytes"].values())
    size = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
    return f"| {row['criterion']} | {row['level']} | {percents} | {size} | {row['seconds']:.2f} |"


def _shares(found: list[dict[str, Any]], task: str) -> list[str]:
    blocks = list(found[0]["shares"][task])
    lines = [f"| criterion | level | {' | '.join(blocks)} |", "|---|---|" + "---|" * len(blocks)]
    for row in found:
        cells = " | ".join(f"{100 * row['shares'][task][block]:.1f}" for block in blocks)
        lines.append(f"| {row['criterion']} | {row['level']} | {cells} |")
    return lines


if __name__ == "__main__":
    main()
