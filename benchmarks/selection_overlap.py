"""What selections choose: where in the network, and how much of it two tasks have in common.

    share of a block    chosen connections in it / chosen connections in all
    overlap of a, b     |a and b| / min(N_a, N_b): places that both chose / places that the smaller
    selection has by chance           the overlap expected of a and b if each layer's places were
    drawn at random: sum_l n_a n_b / E_l / min(N_a, N_b)

Drawn on a canvas of its own (Agg), as `front` is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.adaptation import SelectedIndex
from pipeline.adaptation.selected.ranking import kept_indices

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette."""
_INK = "#222222"
_DOTS_PER_INCH = 110
_DARK_FROM = 0.6
"""Overlap from which a cell is dark enough for white figures."""


def block_of(layer: str) -> str:
    """The block that a layer belongs to: its name up to the block's number (blocks.3), or its first
    part (patch_embed).
    """
    match = re.match(r"(.*?\bblocks\.\d+)\b", layer)
    return match[1] if match else layer.partition(".")[0]


def share_by_block(selected: SelectedIndex, top_k: int) -> dict[str, float]:
    """Share of the connections that K keeps which are in each block, in the network's order. They
    add up to 1.
    """
    counts: dict[str, int] = {block_of(name): 0 for name in selected}
    for name, index_N in kept_indices(selected, top_k).items():
        counts[block_of(name)] += len(index_N)
    return {block: count / sum(counts.values()) for block, count in counts.items()}


def overlap(first: SelectedIndex, second: SelectedIndex, top_k: int) -> float:
    """Share of the connections of the smaller selection that the other has, too."""
    places, others = kept_indices(first, top_k), kept_indices(second, top_k)
    common = sum(
        int(torch.isin(places[name], others[name]).sum()) for name in places.keys() & others.keys()
    )
    return common / _smaller(places, others)


def chance_overlap(
    first: SelectedIndex, second: SelectedIndex, entries: Mapping[str, int], top_k: int
) -> float:
    """The overlap expected where each layer, of so many `entries`, chose as many as it did, but at
    random.
    """
    places, others = kept_indices(first, top_k), kept_indices(second, top_k)
    expected = sum(
        len(places[name]) * len(others[name]) / entries[name]
        for name in places.keys() & others.keys()
    )
    return expected / _smaller(places, others)


def _smaller(places: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> int:
    return min(sum(map(len, places.values())), sum(map(len, others.values())))


def draw_shares(shares: Mapping[str, Mapping[str, float]], path: Path, *, title: str) -> None:
    """Write a PNG: for each series of `shares` (a level, say) the share of each block in %, as bars
    side by side.
    """
    blocks = list(next(iter(shares.values())))
    figure = Figure(
        figsize=(1.6 + 0.8 * len(blocks), 4.2), dpi=_DOTS_PER_INCH, layout="constrained"
    )
    axes, width = figure.add_subplot(), 0.8 / len(shares)
    for number, (name, share_of) in enumerate(shares.items()):
        offset = (number - (len(shares) - 1) / 2) * width
        axes.bar(
            [place + offset for place in range(len(blocks))],
            [100 * share_of[block] for block in blocks],
            width,
            label=name,
            color=_COLOURS[number],
        )
    axes.set_xticks(range(len(blocks)), blocks, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_ylabel("share of chosen connections (%)")
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    _write(figure, path)


def draw_overlaps(
    matrices: Mapping[str, Sequence[Sequence[float]]],
    tasks: Sequence[str],
    path: Path,
    *,
    title: str,
) -> None:
    """Write a PNG: a matrix of overlaps (0 to 1) between `tasks` for each series, with the figures
    in %.
    """
    figure = Figure(
        figsize=(1.2 + 2.3 * len(matrices), 3.2), dpi=_DOTS_PER_INCH, layout="constrained"
    )
    for number, (name, matrix) in enumerate(matrices.items()):
        axes = figure.add_subplot(1, len(matrices), number + 1)
        axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
        axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(tasks)), tasks if number == 0 else [""] * len(tasks))
        axes.set_title(name, fontsize=10.5, color=_INK)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                axes.text(
                    column,
                    row,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    color="white" if value >= _DARK_FROM else _INK,
                )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold", color=_INK)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib in it, the file depends on its data alone.
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
