"""A comparison as people look at it: CSV, Markdown, and the metric against bytes with error bars
and the front.

The figure is drawn as that of a study is (front.py): a canvas of its own, marks that differ in
shape as well as in colour.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pipeline.reports.comparison_row import Comparison
from pipeline.reports.suite import suite_averages
from pipeline.search.pareto import pareto_front
from pipeline.specs import Suite

_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe and Ito's, without the yellow
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


def write_comparison(
    rows: Sequence[Comparison], folder: Path, *, suite: Suite | None = None, notes: str = ""
) -> list[Path]:
    """Write `comparison.csv`, `comparison.md` and a PNG a task into `folder`; the paths written.
    `notes` go above the tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        task: folder / f"{task}.png"
        for task in _tasks(rows)
        if any(row.test_metrics for row in _of(rows, task))
    }
    for task, path in figures.items():
        draw_comparison(
            _of(rows, task),
            path,
            title=f"{task}: test {_metric(_of(rows, task))} against the pack's size",
        )
    (folder / "comparison.csv").write_text(comparison_csv(rows))
    (folder / "comparison.md").write_text(
        comparison_markdown(rows, suite=suite, notes=notes, figures=figures)
    )
    return [folder / "comparison.csv", folder / "comparison.md", *figures.values()]


def _tasks(rows: Sequence[Comparison]) -> list[str]:
    return list(dict.fromkeys(row.task for row in rows))


def _of(rows: Sequence[Comparison], task: str) -> list[Comparison]:
    return [row for row in rows if row.task == task]


def _metric(rows: Sequence[Comparison]) -> str:
    """What the numbers of a task's rows are of."""
    return rows[0].metric


# --- tables ---------------------------------------------------------------------------------------


def comparison_csv(rows: Sequence[Comparison]) -> str:
    """One line a task and method, numbers in full; metrics in [0, 1]."""
    text, cells = StringIO(), [_cells(row) for row in rows]
    writer = csv.DictWriter(text, list(cells[0]) if cells else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


def _cells(row: Comparison) -> dict[str, object]:
    is_tested = bool(row.test_metrics)
    return {
        "task": row.task,
        "method": row.method,
        "metric": row.metric,
        "bytes": row.size_bytes or "",
        "trained_values": row.trained_values or "",
        "test_metric": row.test_metric if is_tested else "",
        "standard_error": row.standard_error if is_tested else "",
        "seed_deviation": row.seed_deviation if is_tested else "",
        "seeds": len(row.test_metrics),
        "test_samples": row.test_samples,
        "val_metric": row.val_metric,
        "bd_rate": "" if row.bd_rate is None else row.bd_rate,
        "bd_rate_error": "" if row.bd_rate_error is None else row.bd_rate_error,
        "trials": row.trials,
        "tuned": json.dumps(row.point),
        "tune_seconds": round(row.tune_seconds, 2),
        "fit_seconds": round(row.fit_seconds, 2),
        "device": row.device,
        "error": row.error,
    }


def comparison_markdown(
    rows: Sequence[Comparison],
    *,
    suite: Suite | None = None,
    notes: str = "",
    figures: dict[str, Path] | None = None,
) -> str:
    """A table a task, by size; for a suite, the averages of every method that has a score for each
    task.
    """
    lines = ["# Methods side by side", ""] + ([notes, ""] if notes else [])
    lines += [
        (
            "Metrics in percent: mean over the seeds ± standard error of that mean (seeds and test"
            " set), then the seeds' standard deviation. Each"
        ),
        (
            "pack reads the test set once. Bytes are the file's. Bold: the front, the methods that"
            " no other is both no larger than and better than."
        ),
    ]
    for task in _tasks(rows):
        lines += ["", f"## {task}: {_metric(_of(rows, task))}", "", *_task_table(_of(rows, task))]
        if figures and task in figures:
            lines += [
                "",
                (
                    f"![{task}: test {_metric(_of(rows, task))} against pack"
                    f" size]({figures[task].name})"
                ),
            ]
    if suite is not None:
        lines += ["", f"## Averages over {suite.name}", "", *_suite_table(rows, suite)]
    return "\n".join(lines) + "\n"


COLUMNS = (
    *("method", "test %", "std of seeds", "bytes", "trained values", "validation %", "BD-rate %"),
    *("tuned", "trials", "tune s", "fit s"),
)


def _task_table(rows: Sequence[Comparison]) -> list[str]:
    front = {row["id"] for row in _front(rows)}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in sorted(rows, key=by_size):
        if row.error:
            lines.append(
                f"| {row.method} | {' '.join(row.error.split())} " + "|" * (len(COLUMNS) - 1)
            )
            continue
        tuned = ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.point.items()
        )
        name, *numbers = shown_cells(row)
        seconds = [f"{row.tune_seconds:.0f}", f"{row.fit_seconds:.0f}"]
        shown_name = f"**{name}**" if name in front else name
        cells = [shown_name, *numbers, tuned, str(row.trials), *seconds]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def by_size(row: Comparison) -> tuple[float, str]:
    """The order of a table: smallest pack first, failed methods last."""
    return row.size_bytes or math.inf, row.method


def shown_cells(row: Comparison) -> list[str]:
    """A tested row's first columns."""
    test = f"{100 * row.test_metric:.1f} ± {100 * row.standard_error:.1f}"
    spread, validation = f"{100 * row.seed_deviation:.1f}", f"{100 * (row.val_metric or 0):.1f}"
    numbers = [f"{row.size_bytes:,}", f"{row.trained_values:,}", validation]
    return [row.method, test, spread, *numbers, _bd_rate(row)]


def _bd_rate(row: Comparison) -> str:
    if row.bd_rate is None:
        return ""
    error = "" if row.bd_rate_error is None else f" ± {100 * row.bd_rate_error:.1f}"
    return f"{100 * row.bd_rate:+.1f}{error}"


def suite_scores(rows: Sequence[Comparison], suite: Suite) -> dict[str, dict[str, float]]:
    """By method, the suite's averages in percent; methods that lack a task's score are left out."""
    methods = list(dict.fromkeys(row.method for row in rows))
    scores = {
        method: {
            row.task: 100 * row.test_metric
            for row in rows
            if row.method == method and row.test_metrics
        }
        for method in methods
    }
    return {
        method: suite_averages(suite, found)
        for method, found in scores.items()
        if found.keys() == set(suite.tasks)
    }


def _suite_table(rows: Sequence[Comparison], suite: Suite) -> list[str]:
    averages = suite_scores(rows, suite)
    names = list(next(iter(averages.values()), {}))
    mean_bytes = {
        method: sum(row.size_bytes for row in rows if row.method == method) / len(suite.tasks)
        for method in averages
    }
    lines = ["| method | mean bytes | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for method, found in averages.items():
        lines.append(
            f"| {method} | {mean_bytes[method]:,.0f} | "
            + " | ".join(f"{found[name]:.2f}" for name in names)
            + " |"
        )
    return lines


def _front(rows: Sequence[Comparison]) -> list[dict[str, object]]:
    points = [
        {
            "id": row.method,
            "state": "complete",
            "size_bytes": row.size_bytes,
            "val_metric": row.test_metric,
        }
        for row in rows
        if row.test_metrics
    ]
    return pareto_front(points)


# --- figure ---------------------------------------------------------------------------------------


def draw_comparison(rows: Sequence[Comparison], path: Path, *, title: str) -> None:
    """Write a PNG: pack size (log) against the test metric, error bars of one standard error, and
    the front. Same rows, same bytes.
    """
    shown = [row for row in rows if row.test_metrics]
    figure = Figure(figsize=(8.6, 5.4), dpi=160, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _set_axes(axes, [row.size_bytes for row in shown], title, _metric(shown))
    front = _front(shown)
    sizes = [float(str(row["size_bytes"])) for row in front] + [axes.get_xlim()[1]]
    percents = [100 * float(str(row["val_metric"])) for row in front]
    axes.step(
        sizes,
        [*percents, percents[-1]],
        where="post",
        color="#7F7F7F",
        linewidth=1.4,
        label="front",
        zorder=1,
    )
    styles = itertools.cycle([(mark, colour) for mark in _MARKS for colour in _COLOURS])
    for row, (mark, colour) in zip(
        sorted(shown, key=lambda row: row.size_bytes), styles, strict=False
    ):
        axes.errorbar(
            row.size_bytes,
            100 * row.test_metric,
            yerr=100 * row.standard_error,
            fmt=mark,
            color=colour,
            markersize=7,
            capsize=3,
            linewidth=1.2,
            label=row.method,
            zorder=2,
        )
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    canvas.print_png(path, metadata={"Software": None})


def _set_axes(axes: Axes, sizes: Sequence[int], title: str, metric: str) -> None:
    low, high = min(sizes) / 1.35, max(sizes) * 1.35
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    stride = 1 + len(powers) // 10
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers[::stride]]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size_bytes, _: f"{size_bytes / 1024:g}"))
    axes.set_xlabel("pack size (KiB)", fontsize=11)
    axes.set_ylabel(f"test {metric} (%)", fontsize=11)
    axes.set_title(title, fontsize=12.5, fontweight="bold", loc="left")
    axes.grid(True, color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
