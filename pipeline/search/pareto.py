"""The Pareto front of a study: the complete trials for which no other is both at most as large and
better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def on_front(sizes: Sequence[float], metrics: Sequence[float]) -> list[int]:
    """Indices of the trials on the front, by ascending size, each with a strictly better metric
    than the previous one. Of trials equal in both, the first is kept.
    """
    front: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: (sizes[index], -metrics[index])):
        if not front or metrics[index] > metrics[front[-1]]:
            front.append(index)
    return front


def pareto_front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The complete rows on the front, by ascending size_bytes, each with a strictly better
    val_metric than the previous one.

    Of rows equal in both, the one with the first id is kept, so the order of `rows` does not
    matter.
    """
    complete = [
        row
        for row in rows
        if row["state"] == "complete"
        and row["val_metric"] is not None
        and math.isfinite(row["val_metric"])
    ]
    complete.sort(key=lambda row: row["id"])
    sizes, metrics = ([row[key] for row in complete] for key in ("size_bytes", "val_metric"))
    return [complete[index] for index in on_front(sizes, metrics)]
