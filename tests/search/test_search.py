"""The search: a study depends on its results alone, never on who finished first; it forgets
nothing, and stays within its budget.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.adaptation import AdaptedModel, attach
from pipeline.adaptation.packing import SizePlanner
from pipeline.backbones import fingerprint, load_backbone, share
from pipeline.cluster.rank_group import WORKER_DIED
from pipeline.driver import stages as stages_module
from pipeline.driver.workspace import Workspace
from pipeline.errors import BudgetError, ClusterError, DataError, TrainingError, WorkerDied
from pipeline.kinds import score
from pipeline.search import run_study as study_module
from pipeline.search.champion import choose_champion
from pipeline.search.pareto import pareto_front
from pipeline.search.proposer import LAG, Enumerated, Sampled, make_proposer
from pipeline.search.run_study import run_study
from pipeline.search.stopping import is_dominated
from pipeline.search.study import Study
from pipeline.search.trial import recipe_key, run_trial
from pipeline.search.trial_record import TrialJournal, TrialRecord
from pipeline.selection import read_selection, select_here, write_selection
from pipeline.specs import (
    Backbone,
    Budget,
    Connections,
    DrawnData,
    Recipe,
    SearchSpace,
    Smoa,
    Task,
    Training,
)
from pipeline.training import Inputs, evaluate, train_epochs

EPOCHS = 6
DIVERGED = TrainingError("the loss became nan")
STANDARD_ERROR = 0.015
"""Of some thousand samples."""
quick = settings(max_examples=15, derandomize=True, deadline=None)
SMALL = SearchSpace(bits=(1, 4), experts=(0, 2), top_k=(0, 1, 3), trials=12)
LARGE = SearchSpace(
    bits=(1, 2, 4, 8), experts=(0, 1, 2, 4), top_k=(1, 2, 3), learning_rate=(1e-3, 3e-3), trials=12
)
spaces = pytest.mark.parametrize("space", [SMALL, LARGE], ids=["enumerated", "sampled"])


def make_task(space: SearchSpace, max_bytes: int = 10_000, seed: int = 0) -> Task:
    return Task(
        name="study",
        data=DrawnData(format="drawn", kind="counting"),
        backbone=Backbone(model="vit_tiny_patch16_224", weights="random"),
        recipe=Recipe(
            connections=Connections(),
            smoa=Smoa(),
            training=Training(epochs=EPOCHS, learning_rate=8e-3),
        ),
        search=space,
        budget=Budget(max_bytes=max_bytes),
        seed=seed,
    )


def fake_size(recipe: Recipe) -> int:
    connections = (
        recipe.connections.top_k * recipe.connections.bits * 10 if recipe.connections else 0
    )
    return 100 + connections + (recipe.smoa.experts * recipe.smoa.bits * 25 if recipe.smoa else 0)


def fake_metric(identity: str, epoch: int) -> float:
    """A learning curve that the trial's id decides; they cross and spread enough that some trials
    are stopped.
    """
    level = int(hashlib.sha256(identity.encode()).hexdigest()[:4], 16) / 0xFFFF
    return round((0.2 + 0.7 * level) * epoch / EPOCHS, 6)


def make_study(task: Task, folder: Path) -> Study:
    return Study(task, make_proposer(task, fake_size), TrialJournal(folder))


def drive(
    study: Study, order: random.Random, *, failing: set[int] = frozenset(), finishes: int = 10**9
) -> list[int]:  # type: ignore[assignment]
    """Run the study as workers would who take turns at random, until nothing is left or `finishes`
    trials ended. The slots that were run.
    """
    running: dict[int, int] = {}
    ran: list[int] = []
    while finishes > 0:
        slot = study.next_slot() if order.random() < 0.7 or not running else None
        if slot is not None:
            running[slot] = 0
            ran.append(slot)
            assert len(running) <= LAG
        elif not running:
            assert study.is_exhausted
            break
        else:
            slot = order.choice(sorted(running))
            running[slot] += 1
            goes_on = study.report(
                slot,
                running[slot],
                fake_metric(study.slots[slot].id, running[slot]),
                STANDARD_ERROR,
            )
            fails = slot in failing and running[slot] == 1
            if not goes_on or fails or running[slot] == EPOCHS:
                study.finish(slot, 1.0, DIVERGED if fails and goes_on else None)
                del running[slot]
                finishes -= 1
    return ran


def outcome(study: Study) -> list[tuple[str, str, tuple[float, ...]]]:
    return [(record.id, record.state, record.curve) for record in study.all_records()]


def reference(task: Task, **options: Any) -> Study:
    """The study one trial at a time."""
    with tempfile.TemporaryDirectory() as folder:
        study = make_study(task, Path(folder))
        while (slot := study.next_slot()) is not None:
            drive_one(study, slot, **options)
        return study


def drive_one(study: Study, slot: int, failing: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    for epoch in range(1, EPOCHS + 1):
        if not study.report(slot, epoch, fake_metric(study.slots[slot].id, epoch), STANDARD_ERROR):
            return study.finish(slot, 1.0, None)
        if slot in failing and epoch == 1:
            return study.finish(slot, 1.0, DIVERGED)
    return study.finish(slot, 1.0, None)


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
    assert [proposal.id for proposal in study.slots] == [proposal.id for proposal in expected.slots]
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
        assert not finished & {resumed.slots[slot].id for slot in ran}, "nothing finished is redone"
        assert outcome(resumed) == outcome(expected)
        replayed = make_study(task, Path(folder))
        assert replayed.next_slot() is None
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
            slot for slot, record in sorted(study.records.items()) if record.state == "failed"
        ] == [1, 4]
        assert len(study.records) == (11 if space is SMALL else 12)
        failed = study.records[1]
        assert (failed.val_metric, failed.message, len(failed.curve)) == (
            None,
            "the loss became nan",
            1,
        )
        assert make_study(task, Path(folder)).next_slot() is None, (
            "a failure that would come again is not tried again"
        )


def test_a_failure_that_may_pass_is_tried_again(tmp_path: Path) -> None:
    task = make_task(SMALL)
    study = make_study(task, tmp_path)
    slot = study.next_slot()
    assert slot == 0
    study.finish(slot, 1.0, WorkerDied("its worker died"))
    assert study.records[0].state == "failed"
    assert make_study(task, tmp_path).next_slot() == 0


def test_a_retried_trial_reports_its_epochs_again(tmp_path: Path) -> None:
    study = make_study(make_task(SMALL), tmp_path)
    study.next_slot()
    for epoch, metric in [(1, 0.1), (2, 0.2), (1, 0.3), (2, 0.4)]:
        assert study.report(0, epoch, metric, STANDARD_ERROR)
    study.finish(0, 1.0, None)
    assert study.records[0].curve == (0.3, 0.4)


def test_a_trial_must_wait_for_the_one_lag_slots_before(tmp_path: Path) -> None:
    study = make_study(make_task(SMALL), tmp_path)
    assert [study.next_slot() for _ in range(LAG + 2)] == [*range(LAG), None, None]
    drive_one(study, 2)
    assert study.next_slot() is None
    drive_one(study, 0)
    assert [study.next_slot() for _ in range(2)] == [LAG, None]
    assert not study.is_exhausted


# --- proposers ------------------------------------------------------------------------------------


def proposals(task: Task) -> tuple[list, list[TrialRecord]]:
    study = reference(task)
    return study.slots, [record for record in study.all_records() if record.state == "rejected"]


@spaces
@pytest.mark.parametrize("max_bytes", [250, 400, 10_000])
def test_nothing_over_budget_is_proposed_and_what_is_left_out_is_listed(
    space: SearchSpace, max_bytes: int
) -> None:
    task = make_task(space, max_bytes)
    slots, rejected = proposals(task)
    assert all(proposal.size_bytes == fake_size(proposal.recipe) <= max_bytes for proposal in slots)
    assert all(proposal.recipe == space.recipe(task.recipe, proposal.point) for proposal in slots)
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
    slots, _ = proposals(task)
    distinct = {recipe_key(SMALL.recipe(task.recipe, point)) for point in SMALL.points()}
    assert SMALL.size() == 12
    assert sorted(proposal.id for proposal in slots) == sorted(distinct)
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
    slots, _ = proposals(task)
    assert len(slots) == LARGE.trials
    assert len({proposal.id for proposal in slots}) == len(slots)


def test_a_space_with_few_points_within_budget_ends_early() -> None:
    task = make_task(LARGE, 130)
    slots, _ = proposals(task)
    feasible = {
        recipe_key(recipe)
        for recipe in (LARGE.recipe(task.recipe, point) for point in LARGE.points())
        if fake_size(recipe) <= 130
    }
    assert {proposal.id for proposal in slots} <= feasible
    assert 0 < len(slots) <= len(feasible) < LARGE.trials


def test_a_seed_decides_what_is_sampled() -> None:
    first, again, other = (proposals(make_task(LARGE, 400, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert [proposal.id for proposal in first[0]] != [proposal.id for proposal in other[0]]


def test_sampling_learns_from_what_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other results, another study: but the first proposals, made before anything was told, are the
    same.
    """
    task = make_task(LARGE.model_copy(update={"trials": 16}))
    first = [proposal.id for proposal in reference(task).slots]
    monkeypatch.setattr(
        f"{__name__}.fake_metric", lambda identity, epoch: 1 - fake_metric_of(identity, epoch)
    )
    other = [proposal.id for proposal in reference(task).slots]
    assert first[:LAG] == other[:LAG]
    assert first != other


fake_metric_of = fake_metric

# --- stopping, front, champion --------------------------------------------------------------------


def record(
    size_bytes: int, *curve: float, state: str = "complete", identity: str = ""
) -> TrialRecord:
    metric = curve[-1] if state == "complete" else None
    identity = identity or f"{size_bytes}-{curve}-{state}"
    return TrialRecord(
        id=identity, point={}, size_bytes=size_bytes, state=state, val_metric=metric, curve=curve
    )  # type: ignore[arg-type]


# Two standard errors are 0.1.
@pytest.mark.parametrize(
    ("curve", "earlier", "stops"),
    [
        ([0.4, 0.5], [record(100, 0.4, 0.61, 0.7)], True),
        ([0.4, 0.5], [record(100, 0.4, 0.59, 0.9)], False),
        ([0.4, 0.5], [record(99, 0.4, 0.61)], True),
        ([0.4, 0.5], [record(101, 0.9, 0.9)], False),
        ([0.4, 0.5], [record(100, 0.9)], False),
        ([0.4, 0.5], [record(100, 0.4, 0.5), record(100, 0.4, 0.65)], True),
        ([0.4, 0.5], [record(100, 0.4, 0.65, state="stopped")], True),
        ([0.4, 0.5], [record(100, 0.4, 0.65, state="failed")], False),
        ([0.4, 0.5], [], False),
        ([0.1], [record(1, 0.9)], False),
        ([0.1, 0.1], [record(1, 0.9, 0.9)], True),
        ([0.1] * 5, [record(1, *[0.9] * 6)], True),
        ([0.1] * 6, [record(1, *[0.9] * 6)], False),
        ([0.0, 0.0], [record(1, 0.0, 0.0)], False),
    ],
    ids=[
        *(
            "clearly worse",
            "within the margin",
            "a smaller one is better",
            "only a larger one is better",
            "ended before this epoch",
        ),
        *(
            "one of several",
            "a stopped one counts",
            "a failed one does not count",
            "nothing to compare with",
        ),
        *("before a third", "at a third", "one before the end", "at the end", "equal"),
    ],
)
def test_a_trial_stops_where_an_earlier_no_larger_one_was_clearly_better(
    curve: list[float], earlier: list[TrialRecord], stops: bool
) -> None:
    assert is_dominated(curve, 0.05, 6, 100, earlier) is stops


CURVES = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.integers(0, 5),
        st.sampled_from(["complete", "complete", "stopped", "rejected"]),
    ),
    max_size=12,
)


@quick
@given(CURVES, st.randoms(use_true_random=False))
def test_the_front_holds_what_no_other_trial_beats(
    trials: list[tuple[int, int, str]], order: random.Random
) -> None:
    rows = [
        record(size, metric / 5, state=state, identity=f"{number:02d}").row()
        for number, (size, metric, state) in enumerate(trials)
    ]
    complete = [row for row in rows if row["state"] == "complete"]

    def beats(a: dict, b: dict) -> bool:
        alike = (a["size_bytes"], a["val_metric"]) == (b["size_bytes"], b["val_metric"])
        return (
            a["size_bytes"] <= b["size_bytes"]
            and a["val_metric"] >= b["val_metric"]
            and (not alike or a["id"] < b["id"])
        )

    expected = [
        row
        for row in complete
        if not any(beats(other, row) for other in complete if other is not row)
    ]
    assert pareto_front(rows) == sorted(expected, key=lambda row: row["size_bytes"])
    order.shuffle(rows)
    assert pareto_front(rows) == sorted(expected, key=lambda row: row["size_bytes"])


@pytest.mark.parametrize(
    ("records", "champion"),
    [
        ([record(100, 0.8), record(50, 0.795), record(20, 0.7949)], 50),
        ([record(100, 0.8), record(50, 0.794)], 100),
        ([record(100, 0.8), record(300, 0.99)], 100),
        (
            [record(100, 0.8), record(50, 0.9, state="stopped"), record(40, 0.9, state="failed")],
            100,
        ),
        ([record(200, 0.9), record(100, 0.9)], 100),
    ],
    ids=[
        "smallest within half a point",
        "none within",
        "over budget",
        "unfinished",
        "smaller of equals",
    ],
)
def test_the_champion_is_the_smallest_close_to_the_best(
    records: list[TrialRecord], champion: int
) -> None:
    budget = Budget(max_bytes=200, within_points=0.5)
    assert choose_champion(records, budget).size_bytes == champion
    assert choose_champion(records[::-1], budget).size_bytes == champion


def test_of_champions_of_one_size_the_better_is_chosen_then_the_first_id() -> None:
    better, worse = record(100, 0.9, identity="z"), record(100, 0.899, identity="a")
    assert choose_champion([worse, better], Budget()) is better
    twin = record(100, 0.9, identity="y")
    assert choose_champion([better, twin], Budget()) is twin


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


def by_hand(**options: Any) -> Callable[..., list[str]]:
    """Stands in for Ray Tune: the study's trials, one after another."""

    def run_all(study: Study, first: int, *others: Any) -> list[str]:
        slot: int | None = first
        while slot is not None:
            drive_one(study, slot, **options)
            slot = study.next_slot()
        return []

    return run_all


def test_a_budget_that_nothing_fits_is_an_error_that_says_how_much_is_needed(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        BudgetError,
        match=(
            r"study: nothing .* fits the budget of 90 bytes; the smallest pack would take 100\."
            r" Raise budget\.max_bytes"
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
    first = study.next_slot()
    assert first is not None
    searcher = StudySearcher(study, first, lambda study: None, {}, lambda: False)
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


def test_a_trial_leaves_the_backbone_it_shares_with_others_as_it_was(
    tiny_inputs: Inputs, tmp_path: Path
) -> None:
    path = tmp_path / "backbone.safetensors"
    share(tiny_inputs.backbone, path)
    before = path.read_bytes()
    spec = tiny_inputs.task.backbone.model_copy(update={"weights": str(path)})
    inputs = replace(tiny_inputs, backbone=load_backbone(spec, tiny_inputs.task.input))
    selected = select_here(inputs, 2)
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
    first = study.next_slot()
    assert first is not None
    searcher = StudySearcher(study, first, lambda study: None, {}, lambda: False)
    configs = {trial: searcher.suggest(trial) for trial in ("a", "b", "c")}
    assert [config["slot"] for config in configs.values()] == [0, 1, 2]  # type: ignore[index,call-overload]
    searcher.on_trial_complete(
        "a", {"error": "TrainingError", "message": "diverged", "time_total_s": 2.0}
    )
    searcher.on_trial_complete("b", None, error=True)
    assert searcher.fatal is None
    assert [study.records[slot].state for slot in (0, 1)] == ["failed", "failed"]
    assert list(TrialJournal(tmp_path).read()) == [study.slots[0].id]
    searcher.on_trial_complete("c", {"error": "DataError", "message": "shard damaged"})
    assert isinstance(searcher.fatal, DataError)
    assert str(searcher.fatal) == "shard damaged"
    assert searcher.suggest("d") == StudySearcher.FINISHED
    assert list(TrialJournal(tmp_path).read()) == [study.slots[0].id]


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
    write_selection(select_here(tiny_inputs, 2), selection)

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
                asked_for.append(len(study.slots)) if study.epochs_done() else None
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
            curve = tuple(
                found.value
                for found, _ in run_trial(tiny_inputs, recipe, read_selection(selection))
            )
            assert (each.state, each.curve, each.val_metric) == ("complete", curve, curve[-1])
            assert each.seconds > 0
            outcomes = journal.outcomes(each.id)
            assert outcomes is not None
            assert tiny_inputs.metric.value(outcomes) == pytest.approx(each.val_metric)
            assert (outcomes.targets == tiny_inputs.splits["val"].labels).all()
    assert journal.read() == {each.id: each for each in records}
    assert sorted(path.name for path in journal.folder.iterdir()) == sorted(
        f"{each.id}.{extension}"
        for each in records
        for extension in ("json", *(["safetensors"] if each.state == "complete" else []))
    )
    monkeypatch.setattr(
        study_module, "_run_with_tune", lambda *args: pytest.fail("nothing is left to run")
    )
    assert run_once() == records


def local_stages(folder: Path) -> stages_module.Stages:
    return stages_module.Stages(
        workspace=Workspace(folder),
        start_ray=lambda: None,
        ray_is_private=True,
        placement=stages_module.Placement(),
        on_progress=stages_module.no_progress,
    )


@pytest.mark.usefixtures("local_ray")
def test_a_fit_whose_worker_dies_again_and_again_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "WORKER_RETRIES", 0)
    stages = local_stages(tmp_path)
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
        local_stages(tmp_path).on_ray(dies_every_time_but_the_last, [(path,)], 1, kept=size)
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
    for record in run(second, tmp_path):
        assert recipe_key(space.recipe(slow, record.point)) == record.id


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
