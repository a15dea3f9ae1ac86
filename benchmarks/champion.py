"""What the rule that chooses the champion costs in accuracy and saves in bytes, by simulation.

    python benchmarks/champion.py [--draws 300]

Takes the recipes of benchmarks/sizes.py with their answers on the validation set, image by image,
and trains nothing. A draw is a study of 12 of a task's recipes, whose validation set is one drawn
with replacement; each rule chooses a pack, whose test accuracy was measured once. Differences to
the old rule, the smallest pack within 0.5 points of the best, are paired over the draws; the
standard error of a test accuracy on one draw is that of its test set, so differences between rules
below it are within noise for one task. Writes benchmarks/results/champion.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine

from pipeline.kinds import Outcomes
from pipeline.kinds.metrics import metric_named
from pipeline.search.champion import not_worse_than_best

HERE = Path(__file__).parent
SIZES, RESULTS = HERE / "results" / "sizes.json", HERE / "results" / "champion.json"
RECIPES = 12
LEVELS = (0.05, 0.1, 0.16, 0.25, 0.5)
OLD = "within 0.5 points"


@dataclass(frozen=True, eq=False)
class Pack:
    """A candidate of one draw; `is_right` [N] of its validation samples."""

    id: str
    size_bytes: int
    is_right: np.ndarray
    test: float

    @property
    def val_metric(self) -> float:
        """Accuracy on the draw's validation set."""
        return float(self.is_right.mean())

    def outcomes(self) -> Outcomes:
        """Two classes, of which the first is right."""
        return Outcomes(np.eye(2)[1 - self.is_right], np.zeros(len(self.is_right), int))


Rule = Callable[[Sequence[Pack]], Pack]


def within_half_a_point(packs: Sequence[Pack]) -> Pack:
    """The old rule."""
    best = max(pack.val_metric for pack in packs)
    near = [pack for pack in packs if pack.val_metric >= best - 0.005 - 1e-9]
    return min(near, key=lambda pack: (pack.size_bytes, -pack.val_metric, pack.id))


def by_level(level: float) -> Rule:
    """The product's rule."""
    metric = metric_named("accuracy", "classification")
    return lambda packs: next(not_worse_than_best(packs, Pack.outcomes, metric, level))


def rules() -> dict[str, Rule]:
    """All rules by name."""
    return {OLD: within_half_a_point, **{f"level {level}": by_level(level) for level in LEVELS}}


def measured(task: str) -> list[Pack]:
    """The packs of a task, as benchmarks/sizes.py measured them."""
    runs = [run for run in json.loads(SIZES.read_text())["runs"] if run["task"] == task]
    return [
        Pack(
            run["recipe"],
            run["bytes"],
            np.unpackbits(np.frombuffer(bytes.fromhex(run["right"]), np.uint8))[
                : run["val_samples"]
            ].astype(int),
            100 * run["correct"] / run["samples"],
        )
        for run in runs
    ]


def simulate(packs: Sequence[Pack], draws: int) -> dict[str, dict[str, float]]:
    """Mean test accuracy and geometric mean of the bytes of each rule's choice."""
    rng = np.random.default_rng(0)
    every = rules()
    chosen: dict[str, list[Pack]] = {name: [] for name in every}
    for _ in range(draws):
        samples = rng.integers(0, len(packs[0].is_right), len(packs[0].is_right))
        numbers = rng.choice(len(packs), RECIPES, replace=False)
        study = [
            Pack(each.id, each.size_bytes, each.is_right[samples], each.test)
            for each in (packs[number] for number in numbers)
        ]
        for name, rule in every.items():
            chosen[name].append(rule(study))
    return {
        name: {
            "test": float(np.mean([pack.test for pack in found])),
            "bytes": float(np.exp(np.mean([np.log(pack.size_bytes) for pack in found]))),
        }
        for name, found in chosen.items()
    }


def page(result: dict[str, Any]) -> str:
    """A table per task."""
    machine = result["machine"]
    lines = [
        "# Rules for the champion",
        "",
        f"`python benchmarks/champion.py --draws {result['draws']}`, commit {machine['commit']}.",
        "",
        f"Each draw is a study of {RECIPES} recipes of [sizes](sizes.md), its validation set drawn",
        "with replacement. Bytes are geometric means. The last column compares with the old rule;",
        "± is the standard error of one pack's test accuracy.",
    ]
    for task in result["tasks"]:
        rows, old = task["rules"], task["rules"][OLD]
        lines += [
            "",
            f"## {task['task']}: {task['packs']} recipes, {task['val_samples']} validation samples",
            "",
            "| rule | test % | bytes | test points | bytes saved |",
            "|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            lines.append(
                f"| {name} | {row['test']:.2f} ± {task['test_error']:.1f} | {row['bytes']:,.0f} |"
                f" {row['test'] - old['test']:+.2f} | {1 - row['bytes'] / old['bytes']:.0%} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate every task that has enough recipes, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=300)
    draws = parser.parse_args().draws
    runs = json.loads(SIZES.read_text())["runs"]
    tasks = []
    for task in dict.fromkeys(run["task"] for run in runs):
        packs = measured(task)
        if len(packs) >= RECIPES:
            samples = next(run["samples"] for run in runs if run["task"] == task)
            mean = np.mean([pack.test for pack in packs])
            tasks.append(
                {
                    "task": task,
                    "packs": len(packs),
                    "val_samples": len(packs[0].is_right),
                    "test_error": float(np.sqrt(mean * (100 - mean) / samples)),
                    "rules": simulate(packs, draws),
                }
            )
    result = {"machine": describe_machine(), "draws": draws, "tasks": tasks}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
