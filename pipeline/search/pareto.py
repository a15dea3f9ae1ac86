"""The Pareto front of a study: the complete trials for which no other is both at most as large and
better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


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
    front: list[dict[str, Any]] = []
    for row in sorted(complete, key=lambda row: (row["size_bytes"], -row["val_metric"], row["id"])):
        if not front or row["val_metric"] > front[-1]["val_metric"]:
            front.append(row)
    return front
