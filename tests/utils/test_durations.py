"""Durations that a user gives."""

from __future__ import annotations

import pytest

from pipeline.utils.durations import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("90", 90), ("1.5h", 5400), (" 2 m ", 120)],
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["0", "0.0s", "-5m", "soon", "", "m", "1d", "1h30m", "inf", "nan"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration above 0, such as 90s, 30m"):
        parse_duration(text)
