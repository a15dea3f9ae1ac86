"""The picture of a study: what each trial costs in bytes and what it reaches, with the Pareto front
and the champion.

Drawn on a canvas of its own (Agg): no pyplot, no change to matplotlib's global settings, no
display. Colours are from Okabe and Ito's palette, and every kind of mark differs in shape or fill
as well, so that the figure reads without colour.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredText
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from pipeline.search.pareto import pareto_front

_BLUE, _VERMILION, _GREY, _INK = "#0072B2", "#D55E00", "#7F7F7F", "#222222"
_SIZE_INCHES, _DOTS_PER_INCH = (7.6, 5.0), 160
_MAX_TICKS = 9
# Above and to the left of a front point no trial can lie, so that side is tried first.
_LABEL_OFFSETS_POINTS = [
    (-14, 16),
    (14, 16),
    (-14, -34),
    (14, -34),
    (-14, 44),
    (14, 44),
    (-14, -62),
    (14, -62),
]


def draw_front(
    trials: list[dict[str, Any]],
    path: Path,
    *,
    title: str,
    metric: str,
    max_bytes: int | None,
    champion: str | None,
    not_worse: Collection[str] = (),
    finer: str | None = None,
) -> None:
    """Write a PNG: pack size in KiB (log) against the validation metric in % for every trial, with
    its standard error.

    A trial: `id`, `point` (searched values), `size_bytes`, `state` (complete, stopped, rejected,
    failed), `val_metric` (0 to 1 or None), `errors` (standard errors by epoch). `champion` is the
    id of a complete trial, `not_worse` are the ids of those that are not significantly worse than
    the best by `metric` and, where packs are compared by another one, too, by `finer`. Same trials,
    same bytes, which are not written again where they are there. Raises ValueError for an unknown
    champion.
    """
    chosen = next(
        (row for row in trials if row["id"] == champion and row["val_metric"] is not None), None
    )
    if champion is not None and chosen is None:
        raise ValueError(f"champion: given {champion!r}, which is no measured trial of this study")
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _set_axes(axes, trials, max_bytes, title, metric)
    _draw_front_line(axes, pareto_front(trials))
    _draw_errors(axes, trials)
    _draw_trials(axes, trials)
    compared = " or ".join(filter(None, [metric, finer]))
    _draw_not_worse(axes, [row for row in trials if row["id"] in not_worse], compared)
    _draw_budget(axes, max_bytes)
    _draw_legend(figure, axes)
    if chosen is not None:
        _draw_champion(axes, canvas, chosen, trials)
    # Without the version of matplotlib in it, the file depends on its data alone.
    drawn = io.BytesIO()
    canvas.print_png(drawn, metadata={"Software": None})
    if not path.exists() or path.read_bytes() != drawn.getvalue():
        path.write_bytes(drawn.getvalue())


def _set_axes(
    axes: Axes, trials: list[dict[str, Any]], max_bytes: int | None, title: str, metric: str
) -> None:
    sizes = [row["size_bytes"] for row in trials] + ([max_bytes] if max_bytes is not None else [])
    low_bytes, high_bytes = min(sizes, default=1024), max(sizes, default=64 * 1024)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low_bytes / 1.35, high_bytes * 1.35)
    axes.xaxis.set_major_locator(FixedLocator(_ticks_bytes(low_bytes / 1.35, high_bytes * 1.35)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size_bytes, _: f"{size_bytes / 1024:g}"))
    percents = [100 * row["val_metric"] for row in _measured(trials)] or [0.0, 100.0]
    span = max(max(percents) - min(percents), 1.0)
    # Room below for the marks of trials that have no metric, above for the champion's label.
    axes.set_ylim(min(percents) - 0.18 * span, max(percents) + 0.25 * span)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda percent, _: f"{percent:g}" if 0 <= percent <= 100 else "")
    )
    axes.set_xlabel("pack size (KiB)", fontsize=11)
    axes.set_ylabel(f"validation {metric} (%)", fontsize=11)
    axes.set_title(
        title,
        fontsize=12.5,
        fontweight="bold",
        loc="left",
        pad=10 if max_bytes is None else 24,
        color=_INK,
    )
    axes.tick_params(labelsize=10)
    axes.grid(True, color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not _measured(trials):
        axes.add_artist(
            AnchoredText(
                "no trial was measured",
                loc="center",
                frameon=False,
                prop={"fontsize": 11, "color": _GREY},
            )
        )


def _ticks_bytes(low_bytes: float, high_bytes: float) -> list[float]:
    """Sizes that are easy to read: powers of two, with quarters between them where there would be
    fewer than three.
    """
    first, last = math.ceil(math.log2(low_bytes)), math.floor(math.log2(high_bytes))
    stride = 1 + (last - first) // _MAX_TICKS
    ticks = [2.0**power for power in range(first, last + 1, stride)]
    if len(ticks) < 3:
        ticks = [
            scale * 2.0**power
            for power in range(first - 1, last + 1)
            for scale in (1, 1.25, 1.5, 1.75)
        ]
    return [tick for tick in ticks if low_bytes <= tick <= high_bytes]


def _measured(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row
        for row in trials
        if row["val_metric"] is not None and row["state"] in ("complete", "stopped")
    ]


def _draw_front_line(axes: Axes, front: list[dict[str, Any]]) -> None:
    if not front:
        return
    # To the right edge: a larger budget never makes the best known value worse.
    sizes = [row["size_bytes"] for row in front] + [axes.get_xlim()[1]]
    percents = [100 * row["val_metric"] for row in front]
    axes.step(
        sizes,
        [*percents, percents[-1]],
        where="post",
        color=_BLUE,
        linewidth=1.6,
        alpha=0.75,
        label="Pareto front",
        zorder=2,
    )


def _draw_errors(axes: Axes, trials: list[dict[str, Any]]) -> None:
    """One standard error up and down."""
    rows = [row for row in _measured(trials) if row.get("errors")]
    axes.errorbar(
        [row["size_bytes"] for row in rows],
        [100 * row["val_metric"] for row in rows],
        yerr=[100 * row["errors"][-1] for row in rows],
        fmt="none",
        ecolor=_BLUE,
        elinewidth=1.0,
        alpha=0.35,
        zorder=1,
    )


def _draw_legend(figure: Figure, axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(
            loc="outside lower center",
            ncols=3,
            frameon=False,
            fontsize=9.5,
            handletextpad=0.5,
            columnspacing=1.4,
        )


def _draw_not_worse(axes: Axes, rows: list[dict[str, Any]], compared: str) -> None:
    if len(rows) > 1:
        axes.scatter(
            [row["size_bytes"] for row in rows],
            [100 * row["val_metric"] for row in rows],
            s=105,
            facecolor="none",
            edgecolor=_VERMILION,
            linewidth=0.9,
            label=f"not significantly worse in {compared}",
            zorder=4,
        )


def _draw_trials(axes: Axes, trials: list[dict[str, Any]]) -> None:
    styles: dict[str, dict[str, Any]] = {
        "complete": {
            "marker": "o",
            "s": 46,
            "facecolor": _BLUE,
            "edgecolor": "white",
            "linewidth": 0.8,
        },
        "stopped": {
            "marker": "o",
            "s": 40,
            "facecolor": "white",
            "edgecolor": _BLUE,
            "linewidth": 1.4,
        },
        "rejected": {"marker": "x", "s": 42, "color": _GREY, "linewidth": 1.5},
        "failed": {
            "marker": "v",
            "s": 42,
            "facecolor": "white",
            "edgecolor": _VERMILION,
            "linewidth": 1.4,
        },
    }
    labels = {
        "complete": "complete",
        "stopped": "stopped early",
        "rejected": "over budget, not run",
        "failed": "failed",
    }
    for state, style in styles.items():
        rows = [row for row in trials if row["state"] == state]
        if state in ("complete", "stopped"):
            rows = _measured(rows)
            heights = [100 * row["val_metric"] for row in rows]
        else:
            heights = [0.035] * len(rows)
            style["transform"] = axes.get_xaxis_transform()
        if rows:
            axes.scatter(
                [row["size_bytes"] for row in rows], heights, label=labels[state], zorder=3, **style
            )


def _draw_budget(axes: Axes, max_bytes: int | None) -> None:
    if max_bytes is None:
        return
    axes.axvline(max_bytes, color=_INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    text = f"budget {max_bytes / 1024:.4g} KiB"
    axes.text(
        max_bytes,
        1.015,
        text,
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        fontsize=9.5,
        color=_INK,
    )


def _draw_champion(
    axes: Axes, canvas: FigureCanvasAgg, champion: dict[str, Any], trials: list[dict[str, Any]]
) -> None:
    """Ring the champion and label it where the label hides the fewest trials."""
    position = (champion["size_bytes"], 100 * champion["val_metric"])
    axes.scatter(*position, s=170, facecolor="none", edgecolor=_VERMILION, linewidth=2.0, zorder=4)
    point = ", ".join(f"{name} {value}" for name, value in champion["point"].items())
    text = f"champion: {position[1]:.1f} %, {position[0] / 1024:.3g} KiB" + (
        f"\n{point}" if point else ""
    )
    # The layout, and with it the place of every dot, is known only once drawn.
    canvas.draw()
    dots = axes.transData.transform(
        [(row["size_bytes"], 100 * row["val_metric"]) for row in _measured(trials)]
    )
    labels = [_label(axes, text, position, offset) for offset in _LABEL_OFFSETS_POINTS]
    covered = [_covered(label, canvas, dots, axes.bbox) for label in labels]
    for label in labels[: covered.index(min(covered))] + labels[covered.index(min(covered)) + 1 :]:
        label.remove()


def _label(
    axes: Axes, text: str, position: tuple[float, float], offset_points: tuple[int, int]
) -> Annotation:
    return axes.annotate(
        text,
        position,
        xytext=offset_points,
        textcoords="offset points",
        horizontalalignment="left" if offset_points[0] > 0 else "right",
        multialignment="left",
        fontsize=9.5,
        color=_INK,
        zorder=5,
        bbox={
            "boxstyle": "round,pad=0.3",
            "facecolor": "white",
            "edgecolor": _VERMILION,
            "linewidth": 0.8,
        },
        arrowprops={"arrowstyle": "-", "color": _VERMILION, "linewidth": 0.8, "shrinkB": 6},
    )


def _covered(label: Annotation, canvas: FigureCanvasAgg, dots: Any, frame: Bbox) -> int:
    """How many dots the label hides; one that leaves the frame counts as hiding all of them."""
    label.update_positions(canvas.get_renderer())
    patch = label.get_bbox_patch()
    assert patch is not None
    box = patch.get_window_extent()
    inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    return int(box.padded(6).count_contains(dots)) + (0 if inside else len(dots) + 1)
