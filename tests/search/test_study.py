"""A study from its first trial to its last record: failures, records that are read
again, Ray Tune."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_stages import make_stages
from helpers_study import (
    LARGE,
    SMALL,
    STANDARD_ERROR,
    drive_one,
    fake_size,
    make_study,
    make_task,
    record,
)

from pipeline.adaptation import AdaptedModel, attach
from pipeline.adaptation.packing import SizePlanner
from pipeline.backbones import fingerprint, load_backbone, share
from pipeline.cluster.rank_group import WORKER_DIED
from pipeline.driver import stages as stages_module
from pipeline.errors import BudgetError, ClusterError, DataError, TrainingError
from pipeline.kinds import score
from pipeline.search import run_study as study_module
from pipeline.search.run_study import run_study
from pipeline.search.stopping import is_dominated
from pipeline.search.study import Study
from pipeline.search.time_limit import SearchTime, TimeLimit
from pipeline.search.trial import recipe_key, run_trial
from pipeline.search.trial_record import TrialJournal, TrialRecord
from pipeline.selection import read_selection, select_locally, write_selection
from pipeline.specs import (
    Recipe,
    SearchSpace,
    Task,
    Training,
)
from pipeline.training import Inputs, evaluate, train_epochs

# --- records --------------------------------------------------------------------------------------


def test_a_journal_gives_back_what_was_written(tmp_path: Path) -> None:
    journal = TrialJournal(tmp_path / "trials")
    assert journal.read() == {}
    kept = [
        record(100, 0.1, 0.2, identity="a"),
        record(5, state="failed", identity="b"),
        record(7, 0.5, state="stopped", identity="c"),
    ]
    for each in kept:
        journal.write(each)
    for name, content in {
        "d.json": "{",
        "e.json": "[]",
        "f.json": '{"curve": []}',
        "g.json": "null",
    }.items():
        (tmp_path / "trials" / name).write_text(content)
    assert journal.read() == {each.id: each for each in kept}


def test_a_recipe_has_one_key() -> None:
    task = make_task(LARGE)
    recipes = [LARGE.recipe(task.recipe, point) for point in LARGE.points()]
    assert all(
        recipe_key(a) == recipe_key(Recipe.model_validate_json(a.model_dump_json()))
        for a in recipes
    )
    assert all((recipe_key(a) == recipe_key(b)) == (a == b) for a in recipes[:20] for b in recipes)


# --- a whole study --------------------------------------------------------------------------------


def run(task: Task, folder: Path) -> list[TrialRecord]:
    return run_study(task, folder, None, TrialJournal(folder), size_of=fake_size)


def no_limit() -> SearchTime:
    return SearchTime(TimeLimit(), "study")


def by_hand(**options: Any) -> Callable[..., list[str]]:
    """Stands in for Ray Tune: the study's trials, one after another."""

    def run_all(study: Study, first: int, *others: Any) -> list[str]:
        number: int | None = first
        while number is not None:
            drive_one(study, number, **options)
            number = study.next_trial()
        return []

    return run_all


def test_a_budget_that_nothing_fits_is_an_error_that_says_how_much_is_needed(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        BudgetError,
        match=(
            r"study: nothing .* fits the budget of 90 bytes; the smallest pack takes at least 100"
            r" \(bits 1, experts 0, top_k 0\)\. Raise budget\.max_bytes"
        ),
    ):
        run(make_task(SMALL, 90), tmp_path)


def test_one_failure_does_not_end_a_study_but_nothing_but_failures_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(SMALL)
    monkeypatch.setattr(study_module, "_run_with_tune", by_hand(failing=set(range(1, 20))))
    states = [each.state for each in run(task, tmp_path / "one")]
    assert states[0] == "complete"
    assert "failed" in states[1:]
    monkeypatch.setattr(study_module, "_run_with_tune", by_hand(failing=set(range(20))))
    with pytest.raises(
        TrainingError,
        match=(
            r"study: no trial completed; \d+ of \d+ trials failed, the first: the loss became nan$"
        ),
    ):
        run(task, tmp_path / "all")


def test_tune_knows_the_options_that_it_is_given() -> None:
    """An option that a release of Tune has renamed would change nothing."""
    from ray.tune.constants import TUNE_ENV_VARS

    study_module._set_tune_options()
    assert {name for name in os.environ if name.startswith("TUNE_")} <= TUNE_ENV_VARS


def test_a_finished_study_needs_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(LARGE, 400)
    monkeypatch.setattr(study_module, "_run_with_tune", by_hand())
    records = run(task, tmp_path)
    monkeypatch.setattr(
        study_module, "_run_with_tune", lambda *args: pytest.fail("nothing is left to run")
    )
    assert run(task, tmp_path) == records


def test_a_trial_scores_validation_after_every_epoch(tiny_inputs: Inputs) -> None:
    recipe = Recipe(
        training=Training(epochs=3, batch_size=16, learning_rate=8e-3, precision="fp32")
    )
    scores = [found for found, _ in run_trial(tiny_inputs, recipe, None)]
    model = attach(tiny_inputs.backbone, recipe, 8, seed=0)
    spec = recipe.training
    expected = [
        score(
            tiny_inputs.metric,
            evaluate(model, tiny_inputs.reader("val"), tiny_inputs.splits["val"], tiny_inputs.kind),
        )
        for _ in train_epochs(
            model,
            tiny_inputs.reader("train"),
            tiny_inputs.splits["train"],
            spec,
            tiny_inputs.kind,
            seed=0,
            flip=False,
        )
    ]
    assert scores == expected
    assert [found.samples for found in scores] == [len(tiny_inputs.splits["val"])] * 3


def test_a_remark_on_the_training_comes_with_the_last_epoch_and_is_kept(
    tiny_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.search.tune import StudySearcher

    monkeypatch.setattr(
        AdaptedModel, "idle_experts", lambda model, total: "an expert was never used"
    )
    recipe = Recipe(training=Training(epochs=2, batch_size=16, precision="fp32"))
    assert [remark for _, remark in run_trial(tiny_inputs, recipe, None)] == [
        "",
        "an expert was never used",
    ]
    study = make_study(make_task(SMALL), tmp_path)
    first = study.next_trial()
    assert first is not None
    searcher = StudySearcher(study, first, lambda study: None, {}, no_limit(), lambda: False)
    searcher.suggest("a")
    study.report(0, 1, 0.5, STANDARD_ERROR)
    searcher.on_trial_complete(
        "a", {"metric": 0.5, "epoch": 1, "remark": "an expert was never used"}
    )
    (record,) = TrialJournal(tmp_path).read().values()
    assert (record.state, record.val_metric, record.message) == (
        "complete",
        0.5,
        "an expert was never used",
    )


def test_trials_that_need_not_wait_start_as_there_is_room(tmp_path: Path) -> None:
    from pipeline.search.tune import StudySearcher

    study, room = make_study(make_task(SMALL), tmp_path), [2]
    first = study.next_trial()
    assert first is not None
    searcher = StudySearcher(
        study, first, lambda study: None, {}, no_limit(), lambda: False, lambda: room[0]
    )
    assert [searcher.suggest(name) is None for name in "abc"] == [False, False, True]
    study.report(0, 1, 0.5, STANDARD_ERROR)
    searcher.on_trial_complete("a", {"metric": 0.5, "epoch": 1})
    assert [searcher.suggest(name) is None for name in "cd"] == [False, True]
    room[0] = 3
    assert [searcher.suggest(name) is None for name in "de"] == [False, True]


def test_a_trial_leaves_the_backbone_it_shares_with_others_as_it_was(
    tiny_inputs: Inputs, tmp_path: Path
) -> None:
    path = tmp_path / "backbone.safetensors"
    share(tiny_inputs.backbone, path)
    before = path.read_bytes()
    spec = tiny_inputs.task.backbone.model_copy(update={"weights": str(path)})
    inputs = replace(tiny_inputs, backbone=load_backbone(spec, tiny_inputs.task.input))
    selected = select_locally(inputs, 2)
    list(run_trial(inputs, tiny_inputs.task.recipe, selected))
    assert path.read_bytes() == before
    assert (
        fingerprint(inputs.backbone.state)
        == inputs.backbone.fingerprint
        == tiny_inputs.backbone.fingerprint
    )


def test_tunes_messages_become_records(tmp_path: Path) -> None:
    """A diverged trial is kept; a dead worker's is tried again another time; a fault of the data
    ends the study.
    """
    from pipeline.search.tune import StudySearcher

    study = make_study(make_task(SMALL), tmp_path)
    first = study.next_trial()
    assert first is not None
    searcher = StudySearcher(study, first, lambda study: None, {}, no_limit(), lambda: False)
    configs = {trial: searcher.suggest(trial) for trial in ("a", "b", "c")}
    assert [config["number"] for config in configs.values()] == [0, 1, 2]  # type: ignore[index,call-overload]
    searcher.on_trial_complete(
        "a", {"error": "TrainingError", "message": "diverged", "time_total_s": 2.0}
    )
    searcher.on_trial_complete("b", None, error=True)
    assert searcher.fatal is None
    assert [study.records[number].state for number in (0, 1)] == ["failed", "failed"]
    assert list(TrialJournal(tmp_path).read()) == [study.proposals[0].id]
    searcher.on_trial_complete("c", {"error": "DataError", "message": "shard damaged"})
    assert isinstance(searcher.fatal, DataError)
    assert str(searcher.fatal) == "shard damaged"
    assert searcher.suggest("d") == StudySearcher.FINISHED
    assert list(TrialJournal(tmp_path).read()) == [study.proposals[0].id]


def check_kept(records: Sequence[TrialRecord], journal: TrialJournal) -> None:
    """The records, and a file of outputs for each complete one, are all that there is."""
    assert journal.read() == {each.id: each for each in records}
    assert sorted(path.name for path in journal.folder.iterdir()) == sorted(
        f"{each.id}.{extension}"
        for each in records
        for extension in ("json", *(["safetensors"] if each.state == "complete" else []))
    )


def check_complete(record: TrialRecord, journal: TrialJournal, inputs: Inputs) -> None:
    """A complete trial, whose kept outputs give its metric."""
    assert (record.state, record.val_metric) == ("complete", record.curve[-1])
    assert record.seconds > 0
    outcomes = journal.outcomes(record.id)
    assert outcomes is not None
    assert inputs.metric.value(outcomes) == pytest.approx(record.val_metric)
    assert (outcomes.targets == inputs.splits["val"].labels).all()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("local_ray")
def test_a_study_runs_on_ray_tune(
    tiny_task: Task,
    tiny_data: Path,
    tiny_inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four trials, one of which diverges: kept whole, the same as in this process, and not run a
    second time.
    """
    space = SearchSpace(top_k=(0, 2), learning_rate=(3e-3, 1e30))
    task = tiny_task.model_copy(update={"search": space})
    journal = TrialJournal(tmp_path / "trials")
    selection = tmp_path / "selection"
    write_selection(select_locally(tiny_inputs, 2), selection)
    planner = SizePlanner(
        task, tiny_inputs.backbone, tiny_inputs.index.classes, read_selection(selection)
    )
    asked_for: list[int] = []

    def run_once() -> list[TrialRecord]:
        return run_study(
            task,
            tiny_data,
            selection,
            journal,
            size_of=planner.size_bytes,
            on_progress=lambda study: (
                asked_for.append(len(study.proposals)) if study.epochs_done() else None
            ),
        )

    records = run_once()
    assert len(records) == 4
    assert asked_for[0] == 4, "trials wait for workers, no worker for trials"
    for each in records:
        recipe = space.recipe(task.recipe, each.point)
        assert (each.id, each.size_bytes) == (recipe_key(recipe), planner.size_bytes(recipe))
        if each.point["learning_rate"] == 1e30:
            assert each.state == "failed"
            assert "with learning rate 1e+30" in each.message
        else:
            found = run_trial(tiny_inputs, recipe, read_selection(selection))
            assert each.curve == tuple(score.value for score, _ in found)
            check_complete(each, journal, tiny_inputs)
    check_kept(records, journal)
    monkeypatch.setattr(
        study_module, "_run_with_tune", lambda *args: pytest.fail("nothing is left to run")
    )
    assert run_once() == records


@pytest.mark.usefixtures("local_ray")
def test_a_fit_whose_worker_dies_again_and_again_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "WORKER_RETRIES", 0)
    stages = make_stages(tmp_path)
    with pytest.raises(
        ClusterError,
        match=(
            f"did not end: {WORKER_DIED}; see whether its memory suffices. The same command tries"
            " again"
        ),
    ):
        list(stages.on_ray(lambda resources: os._exit(1), [()], 1))


@pytest.mark.usefixtures("local_ray")
def test_what_gets_on_is_tried_again_however_often_its_worker_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "WORKER_RETRIES", 1)
    path = tmp_path / "tries"
    path.touch()

    def dies_every_time_but_the_last(path: Path, resources: object) -> int:
        tries = path.stat().st_size
        if tries < 4:
            path.write_text("x" * (tries + 1))
            os._exit(1)
        return tries

    def size(path: Path, resources: object) -> int:
        return path.stat().st_size

    assert list(
        make_stages(tmp_path).on_ray(dies_every_time_but_the_last, [(path,)], 1, kept=size)
    ) == [(0, 4)]


# --- what a journal means to another space --------------------------------------------------------


def test_a_remembered_trial_keeps_its_own_point_in_a_new_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same recipe may be reached from another base recipe by another point: what is registered
    is rebuilt from the point.
    """
    monkeypatch.setattr(study_module, "_run_with_tune", by_hand())
    first = make_task(SearchSpace(top_k=(1, 2)))
    run(first, tmp_path)
    slow = first.recipe.model_copy(
        update={"training": first.recipe.training.model_copy(update={"learning_rate": 1e-4})}
    )
    space = SearchSpace(top_k=(1, 2), learning_rate=(1e-4, first.recipe.training.learning_rate))
    second = first.model_copy(update={"recipe": slow, "search": space})
    for each in run(second, tmp_path):
        assert recipe_key(space.recipe(slow, each.point)) == each.id


def test_a_trial_stopped_against_one_that_is_gone_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(SearchSpace(top_k=(1,)))
    key = recipe_key(task.search.recipe(task.recipe, {"top_k": 1}))
    TrialJournal(tmp_path).write(
        TrialRecord(
            id=key, point={"top_k": 1}, size_bytes=100, state="stopped", curve=(0.1, 0.1, 0.1)
        )
    )
    monkeypatch.setattr(study_module, "_run_with_tune", by_hand())
    assert [record.state for record in run(task, tmp_path)] == ["complete"]


def test_a_failed_trial_stops_no_other() -> None:
    rival = TrialRecord(id="a", point={}, size_bytes=10, state="failed", curve=(0.9, 0.9, 0.9, 0.9))
    assert not is_dominated([0.1, 0.1, 0.1, 0.1], 0.01, 6, 20, [rival])
    assert is_dominated([0.1, 0.1, 0.1, 0.1], 0.01, 6, 20, [replace(rival, state="stopped")])
