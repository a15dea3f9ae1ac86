"""The options that replace sections of a task."""

from __future__ import annotations

import pytest

from pipeline.cli.options import PRESET_TRIALS, overrides
from pipeline.errors import SpecError
from pipeline.specs import SearchSpace


@pytest.mark.parametrize("preset", PRESET_TRIALS)
def test_a_preset_is_a_number_of_trials(preset: str) -> None:
    found = overrides(None, None, "8KiB", None, preset)
    assert found == {
        "search": {"trials": PRESET_TRIALS[preset]},
        "budget": {"max_bytes": "8KiB"},
    }


def test_without_a_preset_the_number_of_trials_is_that_of_good() -> None:
    assert overrides(None, None, None, None) == {}
    assert SearchSpace().trials == PRESET_TRIALS["good"]


def test_a_preset_and_a_number_of_trials_contradict_each_other() -> None:
    with pytest.raises(SpecError, match="--preset fast tries 8 configurations, --trials 3"):
        overrides(None, None, None, 3, "fast")
