"""The simulated batch takes as long as it must, and the page on scale shows what its script
wrote.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from helpers_paths import PROJECT_ROOT

from pipeline.search.proposer import LAG

EXACT = {"epochs": 10, "start_seconds": 5.0, "spread": 0.0}


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "scale_simulation", PROJECT_ROOT / "benchmarks" / "scale_simulation.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def free(simulation: ModuleType) -> object:
    """Costs of nothing."""
    names = ("result", "trial", "study", "study_end", "silent_share", "state_share", "registration")
    return simulation.Costs(**dict.fromkeys(names, 0.0))


def test_one_study_takes_its_stages_one_after_another(simulation: ModuleType, free: object) -> None:
    plan = simulation.Plan(tasks=1, trials=16, gpus=100, studies=1, trial_seconds=100, **EXACT)
    played = simulation.simulate(plan, free)
    select, search, fit = 5 + 3 * 10, 5 + 16 / LAG * 100, 5 + 1.25 * 100
    assert played["hours"] * 3600 == pytest.approx(select + search + fit)
    assert (played["mean_wait_seconds"], played["driver_share"], played["registry_share"]) == (
        0,
        0,
        0,
    )


def test_studies_share_the_gpus_there_are(simulation: ModuleType, free: object) -> None:
    one = simulation.simulate(
        simulation.Plan(tasks=6, trials=8, gpus=4, studies=1, trial_seconds=100, **EXACT), free
    )
    many = simulation.simulate(
        simulation.Plan(tasks=6, trials=8, gpus=4, studies=6, trial_seconds=100, **EXACT), free
    )
    assert one["gpu_share"] < many["gpu_share"] <= 1
    plenty = simulation.simulate(
        simulation.Plan(tasks=6, trials=8, gpus=100, studies=6, trial_seconds=100, **EXACT), free
    )
    assert plenty["hours"] == pytest.approx(one["hours"] / 6)


def test_a_driver_that_is_asked_too_much_sets_the_pace(
    simulation: ModuleType, free: object
) -> None:
    plan = simulation.Plan(tasks=4, trials=8, gpus=16, studies=4, trial_seconds=100, **EXACT)
    slow = simulation.simulate(plan, replace(free, result=2.0))  # type: ignore[type-var]
    results = 4 * 8 * 10
    assert slow["hours"] * 3600 > results * 2.0
    assert slow["mean_wait_seconds"] > 1
    polling = simulation.simulate(plan, replace(free, result=2.0, silent_share=0.1))  # type: ignore[type-var]
    assert polling["hours"] > slow["hours"]
    assert polling["driver_share"] > slow["driver_share"]


def test_packs_queue_for_a_slow_registry(simulation: ModuleType, free: object) -> None:
    plan = simulation.Plan(tasks=5, trials=4, gpus=100, studies=5, trial_seconds=1, **EXACT)
    assert simulation.simulate(plan, replace(free, registration=1000.0))["hours"] * 3600 > 5000  # type: ignore[type-var]


def test_the_page_shows_the_tables_that_the_script_wrote() -> None:
    page = (PROJECT_ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- tables -->\n\n(.+?)\n\n<!-- end of tables -->", page, flags=re.DOTALL)
    assert shown is not None
    results = PROJECT_ROOT / "benchmarks" / "results" / "scale.md"
    if results.exists():
        assert shown[1] in results.read_text(encoding="utf-8")
    else:
        assert shown[1] == "Not measured yet: the script writes its tables here."


def test_an_enumerated_study_runs_all_its_trials_at_once(
    simulation: ModuleType, free: object
) -> None:
    plan = simulation.Plan(
        tasks=1, trials=16, gpus=100, studies=1, trial_seconds=100, learns=False, **EXACT
    )
    played = simulation.simulate(plan, replace(free, coding=7.0))  # type: ignore[type-var]
    select, search, fit = 5 + 3 * 10, 5 + 100, 5 + 1.25 * 100
    assert played["hours"] * 3600 == pytest.approx(select + 7 + search + fit)
    held = (select + 16 * search + fit) / (100 * (select + 7 + search + fit))
    assert played["held_share"] == pytest.approx(held)


def test_enumerated_studies_leave_room_for_each_other(simulation: ModuleType, free: object) -> None:
    """Few trials of each at once, in workers that are reused, take less than many in new ones."""

    def played(studies: int, learns: bool) -> float:
        given = {"tasks": 40, "trials": 16, "gpus": 16, "trial_seconds": 20, **EXACT}
        plan = simulation.Plan(studies=studies, learns=learns, **given)
        return float(simulation.simulate(plan, free)["hours"])

    assert played(8, False) <= played(8, True) < 0.95 * played(2, False)
