"""Lines of Markdown pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev


def table(columns: Sequence[object], rows: Iterable[Iterable[object]]) -> list[str]:
    """A table: header, rule, one line per row."""
    return [_line(columns), "|---" * len(columns) + "|", *map(_line, rows)]


def mean_difference(points: Sequence[float], digits: int = 1) -> str:
    """The mean with its sign, and its standard error between several: `+0.5 ± 0.2`. Empty for no
    points.
    """
    if not points:
        return ""
    mean = f"{fmean(points):+.{digits}f}"
    if len(points) == 1:
        return mean
    return f"{mean} ± {stdev(points) / math.sqrt(len(points)):.{digits}f}"


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
