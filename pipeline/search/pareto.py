"""The accuracy/bytes Pareto front of a study: the complete trials that no other is both smaller than (or equal to) and better than."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def pareto_front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The complete rows on the front, by size_bytes ascending, each with a strictly better val_metric than the one before.

    Of rows alike in both, the one with the first id stays, so the order of `rows` does not matter.
    """
    complete = [row for row in rows if row["state"] == "complete" and row["val_metric"] is not None and math.isfinite(row["val_metric"])]
    front: list[dict[str, Any]] = []
    for row in sorted(complete, key=lambda row: (row["size_bytes"], -row["val_metric"], row["id"])):
        if not front or row["val_metric"] > front[-1]["val_metric"]:
            front.append(row)
    return front
