"""The picture of simulated packs: bytes by part, one bar a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

COLOURS = {
    "positions": "#2b6cb0",
    "values": "#63b3ed",
    "adapters": "#ed8936",
    "biases": "#9f7aea",
    "head": "#48bb78",
    "probe": "#a0aec0",
    "metadata": "#2d3748",
}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Stacked bars, one panel a model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        1, len(models), figsize=(6 * len(models), 4.2), sharex=True, layout="constrained"
    )
    for axis, model in zip(np.atleast_1d(axes), models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        labels = [f"K={row['K']}, {row['bits']} bit, E={row['experts']}" for row in mine]
        left = np.zeros(len(mine))
        for part, colour in COLOURS.items():
            sizes = np.array([row["ledger"][part] for row in mine]) / 1024
            axis.barh(labels, sizes, left=left, color=colour, label=part)
            left += sizes
        axis.invert_yaxis()
        axis.set_title(model)
        axis.set_xlabel("KiB")
    np.atleast_1d(axes)[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
