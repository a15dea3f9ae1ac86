"""Durations as text: what a user gives, and what is shown."""

from __future__ import annotations

import re

_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse_duration(text: str) -> float:
    """Parse a duration such as `90s`, `30m`, `1.5h` or `90` to seconds. Raises ValueError with the
    known units.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _UNIT_SECONDS or float(match[1]) == 0:
        raise ValueError("expected a duration above 0, such as 90s, 30m, 1.5h, or 90 (seconds)")
    return float(match[1]) * _UNIT_SECONDS[match[2]]


def duration(seconds: float | None, *, minutes_from: float = 60) -> str:
    """A duration in seconds, from `minutes_from` in minutes or hours; blank for None."""
    if seconds is None:
        return ""
    if seconds < minutes_from:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
