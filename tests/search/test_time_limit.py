"""A time limit: how many trials run, when they are ended, and that it changes no study."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_study import (
    EPOCHS,
    LARGE,
    STANDARD_ERROR,
    drive_one,
    fake_metric,
    fake_size,
    make_study,
    make_task,
)

from pipeline.errors import SpecError, TimeLimitError
from pipeline.search import run_study as study_module
from pipeline.search.run_study import run_study
from pipeline.search.study import Study
from pipeline.search.time_limit import (
    FINISH_SECONDS,
    FIT_SHARE,
    SearchTime,
    TimeLimit,
    mean_trial_seconds,
    projected_seconds,
)
from pipeline.search.trial_record import TrialJournal, TrialRecord

TRIAL_SECONDS = 60.0
FIT_RATIO = 1.5
RESERVED = FIT_RATIO * TRIAL_SECONDS + FINISH_SECONDS


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(make_task(LARGE), tmp_path)


def within(seconds: float, clock: Clock) -> SearchTime:
    return SearchTime(TimeLimit(seconds, clock), "study", FIT_RATIO)


def start(study: Study, search_time: SearchTime) -> int:
    number = study.next_trial()
    assert number is not None
    search_time.begin(number)
    return number


def end(study: Study, number: int, seconds: float = TRIAL_SECONDS) -> None:
    """A complete trial."""
    for epoch in range(1, EPOCHS + 1):
        study.report(number, epoch, 0.5 + 0.01 * number, STANDARD_ERROR)
    study.finish(number, seconds, None)


# --- estimates ------------------------------------------------------------------------------------


def test_the_first_epoch_does_not_set_the_pace() -> None:
    assert projected_seconds([40.0], 10) is None
    assert projected_seconds([40.0, 50.0], 10) == 50 + 8 * 10
    assert projected_seconds([40.0, 50.0, 64.0], 3) == 64.0


def test_only_complete_trials_tell_how_long_one_takes(study: Study) -> None:
    assert mean_trial_seconds([]) is None
    for seconds in (10.0, 30.0):
        number = study.next_trial()
        assert number is not None
        end(study, number, seconds)
    stopped = TrialRecord(id="s", point={}, size_bytes=1, state="stopped", seconds=500.0)
    assert mean_trial_seconds([*study.records.values(), stopped]) == 20.0


def test_fits_of_several_tasks_share_their_places(clock: Clock) -> None:
    limit = TimeLimit(600.0, clock)
    limit.expect_fit("a", 100.0)
    assert limit.reserved_seconds() == 100.0 + FINISH_SECONDS
    limit.expect_fit("b", 60.0)
    assert limit.reserved_seconds() == 160.0 + FINISH_SECONDS
    limit.places = 2
    assert limit.reserved_seconds() == 130.0 + FINISH_SECONDS
    limit.release("a")
    assert limit.reserved_seconds() == 60.0 + FINISH_SECONDS


# --- which trials start, and when they are ended --------------------------------------------------


def test_no_trial_starts_that_would_leave_too_little_for_the_fit(
    study: Study, clock: Clock
) -> None:
    search_time = within(1000.0, clock)
    end(study, start(study, search_time))
    clock.now += 1000.0 - TRIAL_SECONDS - RESERVED
    assert search_time.may_start(study)
    assert not search_time.is_over(study)
    clock.now += 0.1
    assert not search_time.may_start(study)
    assert search_time.is_over(study), "nothing runs that it could wait for"


def test_a_running_trial_is_ended_once_it_would_end_too_late(study: Study, clock: Clock) -> None:
    search_time = within(1000.0, clock)
    end(study, start(study, search_time))
    number = start(study, search_time)
    clock.now = 2000.0 - RESERVED - 30.0
    search_time.report(number, 1, 25.0)
    search_time.report(number, 2, 30.0)
    assert not search_time.is_over(study), "20 seconds are left of it, and 30 before the fit"
    clock.now += 10.0
    search_time.report(number, 3, 45.0)
    assert search_time.is_over(study), "30 seconds are left of it, and 20 before the fit"
    clock.now -= 500.0
    assert search_time.is_over(study), "its trials have been ended"


def test_a_running_trial_that_ends_in_time_is_awaited(study: Study, clock: Clock) -> None:
    search_time = within(1000.0, clock)
    end(study, start(study, search_time))
    number = start(study, search_time)
    clock.now = 2000.0 - RESERVED - 30.0
    search_time.report(number, 1, 10.0)
    search_time.report(number, 2, 15.0)  # 20 more
    assert not search_time.may_start(study)
    assert not search_time.is_over(study)
    clock.now = 2000.0 - RESERVED + 0.1
    assert search_time.is_over(study), "it took longer than expected"


def test_the_first_trial_is_awaited_as_long_as_its_fit_could_begin(
    study: Study, clock: Clock
) -> None:
    """6 epochs of 10 seconds: 60 seconds, and at least half of a fit of 90."""
    for seconds, is_over in ((60 + FIT_SHARE * 90, False), (60 + FIT_SHARE * 90 - 0.1, True)):
        clock.now = 1000.0
        search_time = within(seconds, clock)
        study.proposals.clear()
        search_time.begin(0)
        study.next_trial()
        for epoch in (1, 2):
            assert not search_time.is_over(study), "nothing is known of the first epoch"
            clock.now += 10.0
            search_time.report(0, epoch, 10.0 * epoch)
        assert search_time.is_over(study) == is_over
        study.proposals.clear()


def test_a_retried_trial_is_timed_from_its_new_start(study: Study, clock: Clock) -> None:
    search_time = within(200.0, clock)
    number = start(study, search_time)
    for epoch, elapsed in ((1, 50.0), (2, 100.0), (1, 5.0), (2, 10.0)):
        search_time.report(number, epoch, elapsed)
    assert not search_time.is_over(study), "30 seconds, and 45 for the fit"


def test_without_a_limit_nothing_is_ever_over(study: Study, clock: Clock) -> None:
    search_time = within(math.inf, clock)
    end(study, start(study, search_time))
    start(study, search_time)
    clock.now += 1e12
    assert search_time.may_start(study)
    assert not search_time.is_over(study)
    search_time.close(study)
    assert (search_time.is_cut, search_time.trials_left) == (False, 0)


# --- a whole study --------------------------------------------------------------------------------


def by_hand(clock: Clock) -> Callable[..., None]:
    """Stands in for Ray Tune: one trial after another, each a minute long."""

    def run_all(study: Study, first: int, *others: Any) -> None:
        search_time = next(other for other in others if isinstance(other, SearchTime))
        number: int | None = first
        while number is not None and search_time.may_start(study):
            search_time.begin(number)
            for epoch in range(1, EPOCHS + 1):
                clock.now += TRIAL_SECONDS / EPOCHS
                search_time.report(number, epoch, epoch * TRIAL_SECONDS / EPOCHS)
                if search_time.is_over(study):
                    return
                if not study.report(
                    number, epoch, fake_metric(study.proposals[number].id, epoch), STANDARD_ERROR
                ):
                    break
            study.finish(number, TRIAL_SECONDS, None)
            number = study.next_trial()

    return run_all


def run(folder: Path, search_time: SearchTime) -> list[TrialRecord]:
    return run_study(
        make_task(LARGE),
        folder,
        None,
        TrialJournal(folder),
        size_of=fake_size,
        search_time=search_time,
    )


def outcomes(records: list[TrialRecord]) -> list[tuple[Any, ...]]:
    return [(each.id, each.state, each.curve) for each in records if each.state != "rejected"]


def test_a_limited_study_is_the_beginning_of_the_whole_one(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "_run_with_tune", by_hand(clock))
    whole = outcomes(run(tmp_path / "whole", within(math.inf, clock)))
    search_time = within(400.0, clock)
    some = outcomes(run(tmp_path / "limited", search_time))
    assert len(whole) == LARGE.trials
    assert 1 < len(some) < len(whole)
    assert some == whole[: len(some)]
    assert search_time.is_cut
    assert search_time.trials_left == LARGE.trials - len(some)
    assert outcomes(run(tmp_path / "limited", within(math.inf, clock))) == whole


def test_a_finished_study_is_not_said_to_be_cut(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "_run_with_tune", by_hand(clock))
    run(tmp_path, within(math.inf, clock))
    search_time = within(1.0, clock)
    run(tmp_path, search_time)
    assert (search_time.is_cut, search_time.trials_left) == (False, 0)
    with pytest.raises(
        TimeLimitError,
        match=(
            r"study: the time limit of 1 s is too short: a trial takes about 60 s here, its fit"
            r" about 90 s, and 1 s were left for it\. The trials are kept"
        ),
    ):
        search_time.check_fit(run(tmp_path, search_time))


def test_without_time_for_another_trial_the_records_are_enough(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(make_task(LARGE), tmp_path)
    number = study.next_trial()
    assert number is not None
    drive_one(study, number)
    monkeypatch.setattr(
        study_module, "_run_with_tune", lambda *args: pytest.fail("there is no time for a trial")
    )
    search_time = within(1.0, clock)
    assert len(outcomes(run(tmp_path, search_time))) == 1
    assert search_time.trials_left == LARGE.trials - 1


def test_a_limit_too_short_for_a_trial_and_its_fit_says_how_long_they_take(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "_run_with_tune", by_hand(clock))
    began = clock.now
    with pytest.raises(
        TimeLimitError,
        match=(
            r"^study: the time limit of 90 s is too short: no trial was complete 70 s before its"
            r" end, and a trial takes about 60 s here and its fit about 90 s\. Give a longer"
            r" --time-limit, or fewer epochs \(recipe\.training\.epochs\)$"
        ),
    ):
        run(tmp_path, within(90.0, clock))
    assert clock.now - began == 20.0, "two epochs tell it"
    with pytest.raises(TimeLimitError, match="none had finished two epochs"):
        run(tmp_path, within(5.0, clock))
    assert list(TrialJournal(tmp_path).read()) == []


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_a_limit_is_positive(seconds: float) -> None:
    with pytest.raises(SpecError, match=r"time_limit_seconds: given .*, expected a number above 0"):
        TimeLimit(seconds)


# --- Ray Tune's callbacks -------------------------------------------------------------------------


def test_tune_gets_no_trial_without_time_and_records_none_that_was_ended(
    study: Study, clock: Clock
) -> None:
    from pipeline.search.tune import StudySearcher

    search_time = within(1000.0, clock)
    first = study.next_trial()
    assert first is not None
    searcher = StudySearcher(study, first, lambda study: None, {}, search_time, lambda: False)
    searcher.suggest("a")
    searcher.suggest("b")
    end(study, first)
    clock.now += 1000.0 - RESERVED + 0.1
    assert searcher.suggest("c") == StudySearcher.FINISHED
    assert search_time.is_over(study)
    study.report(1, 1, 0.5, STANDARD_ERROR)
    searcher.on_trial_complete("b", {"metric": 0.5, "epoch": 1})
    assert sorted(study.records) == [0]
