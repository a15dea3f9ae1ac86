"""What a study tries next depends on its results alone, never on who finished first, and stays
within its budget."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers_cases import for_every
from helpers_study import (
    DIVERGED,
    EPOCHS,
    LARGE,
    SMALL,
    STANDARD_ERROR,
    drive_one,
    fake_metric,
    fake_size,
    make_study,
    make_task,
    quick,
)
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import WorkerDied
from pipeline.search.proposer import (
    LAG,
    Enumerated,
    Sampled,
    make_proposer,
    mean_places,
    most_at_once,
)
from pipeline.search.study import Study
from pipeline.search.trial import recipe_key
from pipeline.search.trial_record import TrialRecord
from pipeline.specs import (
    SearchSpace,
    Task,
)

spaces = pytest.mark.parametrize("space", [SMALL, LARGE], ids=["enumerated", "sampled"])


def drive(
    study: Study, order: random.Random, *, failing: set[int] = frozenset(), finishes: int = 10**9
) -> list[int]:  # type: ignore[assignment]
    """Run the study as workers would who take turns at random, until nothing is left or `finishes`
    trials ended. The proposed that were run.
    """
    running: dict[int, int] = {}
    ran: list[int] = []
    while finishes > 0:
        number = study.next_trial() if order.random() < 0.7 or not running else None
        if number is not None:
            running[number] = 0
            ran.append(number)
            assert len(running) <= most_at_once(study.task)
        elif not running:
            assert study.is_exhausted
            break
        else:
            number = order.choice(sorted(running))
            running[number] += 1
            goes_on = study.report(
                number,
                running[number],
                fake_metric(study.proposals[number].id, running[number]),
                STANDARD_ERROR,
            )
            fails = number in failing and running[number] == 1
            if not goes_on or fails or running[number] == EPOCHS:
                study.finish(number, 1.0, DIVERGED if fails and goes_on else None)
                del running[number]
                finishes -= 1
    return ran


def outcome(study: Study) -> list[tuple[str, str, tuple[float, ...]]]:
    return [(record.id, record.state, record.curve) for record in study.all_records()]


def reference(task: Task, **options: Any) -> Study:
    """The study one trial at a time."""
    with tempfile.TemporaryDirectory() as folder:
        study = make_study(task, Path(folder))
        while (number := study.next_trial()) is not None:
            drive_one(study, number, **options)
        return study


# --- order, memory, budget ------------------------------------------------------------------------


@spaces
@quick
@given(seed=st.integers(0, 2**32))
def test_who_finishes_first_changes_nothing(space: SearchSpace, seed: int) -> None:
    task = make_task(space, max_bytes=400)
    expected = reference(task)
    with tempfile.TemporaryDirectory() as folder:
        study = make_study(task, Path(folder))
        drive(study, random.Random(seed))
    assert [proposal.id for proposal in study.proposals] == [
        proposal.id for proposal in expected.proposals
    ]
    assert outcome(study) == outcome(expected)


@spaces
def test_some_trials_are_stopped_and_some_are_not(space: SearchSpace) -> None:
    """So that the tests of order and memory have something to get wrong."""
    states = [record.state for record in reference(make_task(space, max_bytes=400)).all_records()]
    assert {"complete", "stopped", "rejected"} <= set(states)


@spaces
@quick
@given(seed=st.integers(0, 2**32), finishes=st.integers(0, 12))
def test_an_interrupted_study_goes_on_where_it_was(
    space: SearchSpace, seed: int, finishes: int
) -> None:
    task = make_task(space, max_bytes=400)
    expected = reference(task)
    with tempfile.TemporaryDirectory() as folder:
        interrupted = make_study(task, Path(folder))
        drive(interrupted, random.Random(seed), finishes=finishes)
        finished = {record.id for record in interrupted.records.values()}
        resumed = make_study(task, Path(folder))
        ran = drive(resumed, random.Random(seed + 1))
        assert not finished & {resumed.proposals[number].id for number in ran}, (
            "nothing finished is redone"
        )
        assert outcome(resumed) == outcome(expected)
        replayed = make_study(task, Path(folder))
        assert replayed.next_trial() is None
        assert replayed.is_exhausted
        assert outcome(replayed) == outcome(expected)
        assert replayed.all_records() == resumed.all_records()


@spaces
def test_a_trial_that_fails_is_kept_and_the_study_goes_on(space: SearchSpace) -> None:
    task = make_task(space)
    expected = reference(task, failing={1, 4})
    with tempfile.TemporaryDirectory() as folder:
        study = make_study(task, Path(folder))
        drive(study, random.Random(5), failing={1, 4})
        assert outcome(study) == outcome(expected)
        assert [
            number for number, record in sorted(study.records.items()) if record.state == "failed"
        ] == [1, 4]
        assert len(study.records) == (11 if space is SMALL else 12)
        failed = study.records[1]
        assert (failed.val_metric, failed.message, len(failed.curve)) == (
            None,
            "the loss became nan",
            1,
        )
        assert make_study(task, Path(folder)).next_trial() is None, (
            "a failure that would come again is not tried again"
        )


def test_a_failure_that_may_pass_is_tried_again(tmp_path: Path) -> None:
    task = make_task(SMALL)
    study = make_study(task, tmp_path)
    number = study.next_trial()
    assert number == 0
    study.finish(number, 1.0, WorkerDied("its worker died"))
    assert study.records[0].state == "failed"
    assert make_study(task, tmp_path).next_trial() == 0


def test_a_retried_trial_reports_its_epochs_again(tmp_path: Path) -> None:
    study = make_study(make_task(SMALL), tmp_path)
    study.next_trial()
    for epoch, metric in [(1, 0.1), (2, 0.2), (1, 0.3), (2, 0.4)]:
        assert study.report(0, epoch, metric, STANDARD_ERROR)
    study.finish(0, 1.0, None)
    assert study.records[0].curve == (0.3, 0.4)


def test_all_points_of_an_enumerated_space_may_run_at_once(tmp_path: Path) -> None:
    study = make_study(make_task(SMALL), tmp_path)
    started = [study.next_trial() for _ in range(12)]
    assert started == [*range(11), None], "two points are one recipe"
    assert study.is_exhausted
    for number in (9, 8):  # both end before those that may stop them
        drive_one(study, number)
    assert not study.records
    assert study.has_ended(9)
    resumed = make_study(make_task(SMALL), tmp_path)
    assert [resumed.next_trial() for _ in range(12)] == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        10,
        None,
        None,
        None,
    ]
    resumed.close()
    assert set(resumed.records) == {8, 9}, "a time limit keeps what has ended"


@for_every(
    ("space", "at_once", "places"),
    [
        (SMALL, 12, (12 + 1.25) / (3 + 1.25)),
        (LARGE, LAG, (12 + 1.25) / (3 + 1.25)),
        (SearchSpace(bits=(1, 4, 8), trials=12), 3, (3 + 1.25) / (1 + 1.25)),
        (LARGE.model_copy(update={"trials": 2}), 2, (2 + 1.25) / (1 + 1.25)),
    ],
)
def test_a_study_takes_as_many_places_as_its_trials_can(
    space: SearchSpace, at_once: int, places: float
) -> None:
    task = make_task(space)
    assert most_at_once(task) == at_once
    assert mean_places(task) == pytest.approx(places)


def test_a_trial_of_a_sampled_space_must_wait_for_the_one_lag_slots_before(tmp_path: Path) -> None:
    study = make_study(make_task(LARGE), tmp_path)
    assert [study.next_trial() for _ in range(LAG + 2)] == [*range(LAG), None, None]
    drive_one(study, 2)
    assert study.next_trial() is None
    drive_one(study, 0)
    assert [study.next_trial() for _ in range(2)] == [LAG, None]
    assert not study.is_exhausted


# --- proposers ------------------------------------------------------------------------------------


def proposals(task: Task) -> tuple[list, list[TrialRecord]]:
    study = reference(task)
    return study.proposals, [record for record in study.all_records() if record.state == "rejected"]


@spaces
@for_every("max_bytes", [250, 400, 10_000])
def test_nothing_over_budget_is_proposed_and_what_is_left_out_is_listed(
    space: SearchSpace, max_bytes: int
) -> None:
    task = make_task(space, max_bytes)
    proposed, rejected = proposals(task)
    assert all(
        proposal.size_bytes == fake_size(proposal.recipe) <= max_bytes for proposal in proposed
    )
    assert all(
        proposal.recipe == space.recipe(task.recipe, proposal.point) for proposal in proposed
    )
    assert all(record.size_bytes > max_bytes and record.val_metric is None for record in rejected)
    assert len({record.id for record in rejected}) == len(rejected)
    assert (rejected == []) == (max_bytes == 10_000)
    if space is SMALL:
        everything = {
            recipe_key(recipe): fake_size(recipe)
            for recipe in (space.recipe(task.recipe, point) for point in space.points())
        }
        assert {record.id for record in rejected} == {
            key for key, size in everything.items() if size > max_bytes
        }


def test_points_that_lead_to_one_recipe_run_once() -> None:
    """Without experts and connections, bits change nothing."""
    task = make_task(SMALL)
    proposed, _ = proposals(task)
    distinct = {recipe_key(SMALL.recipe(task.recipe, point)) for point in SMALL.points()}
    assert SMALL.size() == 12
    assert sorted(proposal.id for proposal in proposed) == sorted(distinct)
    assert len(distinct) == 11


def test_a_small_space_is_enumerated_smallest_pack_first() -> None:
    task = make_task(SMALL)
    assert isinstance(make_proposer(task, fake_size), Enumerated)
    sizes = [proposal.size_bytes for proposal in proposals(task)[0]]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("max_bytes", [300, 10_000])
def test_a_large_space_is_sampled_without_repetition(max_bytes: int) -> None:
    task = make_task(LARGE, max_bytes)
    assert isinstance(make_proposer(task, fake_size), Sampled)
    proposed, _ = proposals(task)
    assert len(proposed) == LARGE.trials
    assert len({proposal.id for proposal in proposed}) == len(proposed)


def test_a_space_with_few_points_within_budget_ends_early() -> None:
    task = make_task(LARGE, 130)
    proposed, _ = proposals(task)
    feasible = {
        recipe_key(recipe)
        for recipe in (LARGE.recipe(task.recipe, point) for point in LARGE.points())
        if fake_size(recipe) <= 130
    }
    assert {proposal.id for proposal in proposed} <= feasible
    assert 0 < len(proposed) <= len(feasible) < LARGE.trials


def test_a_seed_decides_what_is_sampled() -> None:
    first, again, other = (proposals(make_task(LARGE, 400, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert [proposal.id for proposal in first[0]] != [proposal.id for proposal in other[0]]


def test_sampling_learns_from_what_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other results, another study: but the first proposals, made before anything was told, are the
    same.
    """
    task = make_task(LARGE.model_copy(update={"trials": 16}))
    first = [proposal.id for proposal in reference(task).proposals]
    monkeypatch.setattr(
        "helpers_study.fake_metric", lambda identity, epoch: 1 - fake_metric(identity, epoch)
    )
    other = [proposal.id for proposal in reference(task).proposals]
    assert first[:LAG] == other[:LAG]
    assert first != other
