"""What the rule that chooses the champion costs in accuracy and saves in bytes, by simulation.

    python benchmarks/champion.py [--draws 300]

Takes recipes with their answers on the validation set, image by image, and trains nothing. A draw
is a study of 12 of a task's recipes, whose validation set is one drawn with replacement; each rule
chooses a pack. Its accuracy is

    sizes.json   that on the test set, measured once
    bytes.json   that on the validation samples that were not drawn, a third on average

Differences to the old rule, the smallest pack within 0.5 points of the best, are paired over the
draws; the standard error of one pack's accuracy on the samples of its set is shown beside them,
because differences between rules below it are within noise for one task. Writes
benchmarks/results/champion.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from machine import describe_machine

from pipeline.kinds import Outcomes
from pipeline.kinds.metrics import metric_named
from pipeline.search.champion import Chosen, not_worse_than_best

HERE = Path(__file__).parent
SIZES, BYTES = HERE / "results" / "sizes.json", HERE / "results" / "bytes.json"
RESULTS = HERE / "results" / "champion.json"
RECIPES = 12
MAX_BYTES = 64 << 10
LEVELS = (0.05, 0.1, 0.16, 0.25, 0.5)
OLD = "within 0.5 points"


@dataclass(frozen=True, eq=False)
class Pack:
    """A candidate of one draw; `is_right` [N] of its validation samples. `test` is its accuracy on
    others in percent; None where it is that on the samples that are not drawn.
    """

    id: str
    size_bytes: int
    is_right: np.ndarray
    test: float | None

    def drawn(self, samples: np.ndarray) -> Pack:
        """This pack on a validation set of these samples, by number."""
        left = np.delete(self.is_right, samples)
        test = 100 * float(left.mean()) if self.test is None else self.test
        return Pack(self.id, self.size_bytes, self.is_right[samples], test)

    @property
    def val_metric(self) -> float:
        """Accuracy on the draw's validation set."""
        return float(self.is_right.mean())

    def outcomes(self) -> Outcomes:
        """Two classes, of which the first is right."""
        return Outcomes(np.eye(2)[1 - self.is_right], np.zeros(len(self.is_right), int))


Rule = Callable[[Sequence[Pack]], Pack]


def within_half_a_point(packs: Sequence[Chosen]) -> Chosen:
    """The old rule, for packs that all have a validation accuracy."""
    metrics = [pack.val_metric or 0.0 for pack in packs]
    least = max(metrics) - 0.005 - 1e-9
    near = [(pack, metric) for pack, metric in zip(packs, metrics, strict=True) if metric >= least]
    return min(near, key=lambda each: (each[0].size_bytes, -each[1], each[0].id))[0]


def by_level(level: float) -> Rule:
    """The product's rule."""
    metric = metric_named("accuracy", "classification")
    return lambda packs: next(not_worse_than_best(packs, Pack.outcomes, metric, level))


def rules() -> dict[str, Rule]:
    """All rules by name."""
    return {OLD: within_half_a_point, **{f"level {level}": by_level(level) for level in LEVELS}}


def unpacked(bits: str, count: int) -> np.ndarray:
    """Which of so many answers are right, 0 or 1, [N]."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))[:count].astype(int)


def of_sizes() -> dict[str, list[Pack]]:
    """The packs of each task, as benchmarks/sizes.py measured them."""
    found: dict[str, list[Pack]] = {}
    for run in json.loads(SIZES.read_text())["runs"]:
        is_right = unpacked(run["right"], run["val_samples"])
        test = 100 * run["correct"] / run["samples"]
        pack = Pack(run["recipe"], run["bytes"], is_right, test)
        found.setdefault(run["task"], []).append(pack)
    return found


def of_bytes() -> dict[str, list[Pack]]:
    """The complete trials of each task up to 64 KiB, as benchmarks/bytes.py kept them; of the first
    seed.
    """
    found: dict[str, list[Pack]] = {}
    cells = json.loads(BYTES.read_text())["cells"] if BYTES.exists() else []
    for cell in cells:
        packs = {
            row["id"]: Pack(
                row["id"], row["bytes"], unpacked(row["right"], cell["samples"]["val"]), None
            )
            for row in cell["trials"]
            if "right" in row and row["bytes"] <= MAX_BYTES
        }
        found.setdefault(f"{cell['task']}, {cell['backbone']}", list(packs.values()))
    return found


def simulate(packs: Sequence[Pack], draws: int) -> dict[str, dict[str, float]]:
    """Mean test accuracy and geometric mean of the bytes of each rule's choice."""
    rng = np.random.default_rng(0)
    every = rules()
    chosen: dict[str, list[Pack]] = {name: [] for name in every}
    for _ in range(draws):
        samples = rng.integers(0, len(packs[0].is_right), len(packs[0].is_right))
        numbers = rng.choice(len(packs), RECIPES, replace=False)
        study = [packs[number].drawn(samples) for number in numbers]
        for name, rule in every.items():
            chosen[name].append(rule(study))
    return {
        name: {
            "test": fmean(pack.test for pack in found if pack.test is not None),
            "bytes": float(np.exp(np.mean([np.log(pack.size_bytes) for pack in found]))),
        }
        for name, found in chosen.items()
    }


def differences(
    tasks: Sequence[dict[str, Any]], names: Sequence[str], accuracy: str
) -> Iterator[str]:
    """A line per rule: its difference to the old one over all tasks in points, with the standard
    error, and the share of bytes saved, of geometric means. `accuracy` is its name in a rule's row.
    """
    for name in names:
        pairs = [(task["rules"][name], task["rules"][OLD]) for task in tasks]
        points = [new[accuracy] - old[accuracy] for new, old in pairs]
        saved = 1 - np.exp(fmean(np.log(new["bytes"] / old["bytes"]) for new, old in pairs))
        error = np.std(points, ddof=1) / np.sqrt(len(points)) if len(points) > 1 else np.nan
        yield f"| {name} | {fmean(points):+.2f} ± {error:.2f} | {saved:.0%} |"


def page(result: dict[str, Any]) -> str:
    """A table per task."""
    machine = result["machine"]
    lines = [
        "# Rules for the champion",
        "",
        f"`python benchmarks/champion.py --draws {result['draws']}`, commit {machine['commit']}.",
        "",
        f"Each draw is a study of {RECIPES} recipes, its validation set drawn with replacement.",
        "Accuracies are on the test set, of the recipes of [sizes](sizes.md), or on the validation",
        "samples that were not drawn, of the trials of [bytes](bytes.md). Bytes are geometric",
        "means. The last columns compare with the old rule; ± is the standard error of one pack's",
        "accuracy. These rules compare errors alone; the product's compares likelihoods, too, and",
        "is simulated in [likelihood](champion_likelihood.md).",
        "",
        "| rule | accuracy against the old rule, mean over the tasks | bytes saved |",
        "|---|---|---|",
        *differences(result["tasks"], list(rules()), "test"),
    ]
    for task in result["tasks"]:
        rows, old = task["rules"], task["rules"][OLD]
        lines += [
            "",
            f"## {task['task']}: {task['packs']} recipes, {task['val_samples']} validation samples",
            "",
            f"| rule | {task['judged_on']} % | bytes | points | bytes saved |",
            "|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            lines.append(
                f"| {name} | {row['test']:.2f} ± {task['test_error']:.1f} | {row['bytes']:,.0f} |"
                f" {row['test'] - old['test']:+.2f} | {1 - row['bytes'] / old['bytes']:.0%} |"
            )
    return "\n".join(lines) + "\n"


def row_of(task: str, packs: Sequence[Pack], judged_on: str, draws: int) -> dict[str, Any]:
    """All rules on one task."""
    test = json.loads(SIZES.read_text())["runs"]
    count = len(packs[0].is_right)
    samples = next((run["samples"] for run in test if run["task"] == task), count)
    mean = fmean(100 * pack.val_metric if pack.test is None else pack.test for pack in packs)
    return {
        "task": task,
        "judged_on": judged_on,
        "packs": len(packs),
        "val_samples": count,
        "test_error": float(np.sqrt(mean * (100 - mean) / samples)),
        "rules": simulate(packs, draws),
    }


def main() -> None:
    """Simulate every task that has enough recipes, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=300)
    draws = parser.parse_args().draws
    tasks = []
    for judged_on, found in (("test", of_sizes()), ("left-out", of_bytes())):
        for task, packs in found.items():
            if len(packs) >= RECIPES:
                tasks.append(row_of(task, packs, judged_on, draws))
    result = {"machine": describe_machine(), "draws": draws, "tasks": tasks}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
