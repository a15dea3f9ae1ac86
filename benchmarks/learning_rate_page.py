"""The page of the learning rates: a table and a panel for each backbone and task."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt

Line = Mapping[float, Sequence[Mapping[str, Any]]]
"""The runs of one recipe on one case, by rate."""


def lines_of(
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, dict[float, list[Mapping[str, Any]]]]]:
    """Runs by case, recipe and rate; rates ascend."""
    found: dict[str, dict[str, dict[float, list[Mapping[str, Any]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for run in sorted(runs, key=lambda run: run["rate"]):
        found[run["case"]][run["recipe"]][run["rate"]].append(run)
    return found


def accuracy(runs: Sequence[Mapping[str, Any]]) -> float:
    """Percent, mean over the seeds."""
    return 100 * fmean(run["correct"] / run["samples"] for run in runs)


def standard_error(runs: Sequence[Mapping[str, Any]]) -> float:
    """In points, binomial: of one draw of the validation images, which all seeds share."""
    share = accuracy(runs) / 100
    return 100 * math.sqrt(share * (1 - share) / runs[0]["samples"])


def _shown(runs: Sequence[Mapping[str, Any]] | None) -> str:
    if not runs:
        return ""
    return f"{accuracy(runs):.1f}" + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")


def _commit(line: Line, latest: str) -> str:
    """The commits of a line's runs, where they are not the latest."""
    commits = sorted({run["commit"] for runs in line.values() for run in runs} - {latest})
    return f" (commit {', '.join(commits)})" if commits else ""


def _table(header: str, rows: Mapping[str, Sequence[str]], rates: Sequence[float]) -> list[str]:
    cells = [
        f"| {header} | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "|---|" + "---:|" * len(rates),
    ]
    return [*cells, *(f"| {name} | {' | '.join(row)} |" for name, row in rows.items()), ""]


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Markdown at `path`, and the figure beside it."""
    machine, cases = result["machine"], lines_of(result["runs"])
    rates = sorted({run["rate"] for run in result["runs"]})
    text = [
        "# Learning rate",
        "",
        (
            f"`python benchmarks/learning_rate.py`, last on {machine['cpu']}, torch"
            f" {machine['torch']}, commit {machine['commit']} unless a row names another."
        ),
        "",
        "Validation accuracy in percent with batches of 32 images, by the peak of the learning",
        "rate. The test images are never read. A backbone's name stands before the task's.",
        "The ViT-S (98 px) is DINOv2 further trained for saliency, not the pristine one; the",
        "others read 64 px. The dotted lines are the defaults.",
        "",
        f"![validation accuracy against the learning rate]({path.with_suffix('.png').name})",
        "",
    ]
    for case, lines in cases.items():
        runs = [run for line in lines.values() for each in line.values() for run in each]
        largest = max(standard_error(each) for line in lines.values() for each in line.values())
        about = (
            f"{runs[0]['epochs']} epochs, {runs[0]['samples']} validation images; standard errors"
            f" of up to {largest:.1f} points."
        )
        text += [f"## {case}", "", f"{about} The default rate is {result['defaults'][case]:g}.", ""]
        rows = {
            name + _commit(line, machine["commit"]): [_shown(line.get(rate)) for rate in rates]
            for name, line in lines.items()
        }
        text += _table("recipe", rows, rates)
    path.write_text("\n".join(text))
    _draw(cases, result["defaults"], path.with_suffix(".png"))


def _draw(
    cases: Mapping[str, Mapping[str, Line]], defaults: Mapping[str, float], path: Path
) -> None:
    """One panel a case, one line a recipe of several rates, binomial standard errors."""
    drawn = {
        case: {name: line for name, line in lines.items() if len(line) > 1}
        for case, lines in cases.items()
    }
    drawn = {case: lines for case, lines in drawn.items() if lines}
    figure, axes = plt.subplots(
        1,
        len(drawn),
        figsize=(4 * len(drawn), 3.6),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (case, lines) in zip(axes[0], drawn.items(), strict=True):
        for name, line in lines.items():
            errors = [standard_error(runs) for runs in line.values()]
            axis.errorbar(
                list(line),
                [accuracy(runs) for runs in line.values()],
                errors,
                label=name,
                marker="o",
                markersize=3,
                capsize=2,
            )
        axis.axvline(defaults[case], color="#a0aec0", linestyle=":")
        axis.set(title=case, xscale="log", xlabel="learning rate")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("validation accuracy, %")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
