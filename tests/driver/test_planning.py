"""What a task asks of the driver is computed by workers where there are any, with the same outcome.

Ray has a GPU here that nobody computes on, so there are workers, although it is private.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest
import ray
from helpers_cli import TASK, new_workdir, write_task
from helpers_points import ARGUMENTS, POINT_BACKBONE, SOLIDS
from helpers_stages import make_stages

from pipeline.adaptation.packing import SizePlanner
from pipeline.cluster.task_pool import Interrupted
from pipeline.driver import elsewhere, planning
from pipeline.driver.batch import run_batch
from pipeline.driver.planning import check_study, size_of
from pipeline.driver.stages import CHECKED_AT_ONCE, Placement, Stages
from pipeline.errors import BackboneError, BudgetError, ClusterError, TaskpackError, UnexpectedError
from pipeline.packs import Part, read_pack
from pipeline.search import champion
from pipeline.selection import select_locally, write_selection
from pipeline.specs import Budget, SearchSpace, Selection, Task
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, rehearsal

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
RAY_CPUS, RAY_GPUS = 2, 1
SPACE = SearchSpace(bits=(1, 4), experts=(0, 2), top_k=(1, 2), learning_rate=(0.001, 0.002))


@pytest.fixture(scope="module", autouse=True)
def workers_know_this_file() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(module := sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


class OfStudies(Stages):
    """The stages with the checks of a batch."""

    check = staticmethod(check_study)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that leaves this process without workers."""
    return lambda: monkeypatch.setattr(elsewhere, "is_connected", lambda: False)


@contextlib.contextmanager
def driver_at_rest() -> Iterator[None]:
    """A context in which this process can do nothing of what workers should."""

    def fail(*given: object, **named: object) -> NoReturn:
        raise AssertionError("computed in the driver")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "_train_and_pack", fail)
        patch.setattr(rehearsal, "_rehearsed", set())
        patch.setattr(SizePlanner, "ledger", fail)
        patch.setattr(Part, "encoded_positions", property(fail))
        patch.setattr(champion, "not_worse_than_best", fail)
        patch.setattr("pipeline.selection.stage._ranked", fail)
        patch.setattr("pipeline.driver.calibrated.calibrate", fail)
        yield


def sizes(inputs: Inputs, selection: Path | None, stages: Stages) -> list[int]:
    bytes_of, space = size_of(inputs, selection, stages.elsewhere), inputs.task.search
    return [bytes_of(space.recipe(inputs.task.recipe, point)) for point in space.points()]


# --- prepare --------------------------------------------------------------------------------------


def test_a_worker_resolves_and_checks_a_task(
    tiny_task: Task, tmp_path: Path, alone: Callable[[], None]
) -> None:
    """A derived search space, a part without a place, and the remark about it."""
    task = Task.model_validate(
        {**tiny_task.model_dump(exclude={"recipe", "search", "selection"}), "name": "derived"}
    )
    told: list[str] = []
    there = make_stages(tmp_path / "there", OfStudies)
    there.on_progress = lambda name, stage, share, remark: told.append(remark)
    with driver_at_rest():
        found = there.prepare(task)
    assert found.search.configurations
    assert found.backbone == task.backbone, "as the user wrote it"
    alone()
    here, expected = make_stages(tmp_path / "here", OfStudies), list[str]()
    here.on_progress = lambda name, stage, share, remark: expected.append(remark)
    assert here.prepare(task) == found
    assert told == expected


class AsksForWeights(Stages):
    """Says which weights a worker is given."""

    @staticmethod
    def check(inputs: Inputs) -> None:
        raise BackboneError(inputs.task.backbone.weights)


def test_a_worker_maps_the_shared_backbone_and_this_process_its_own(
    tiny_task: Task, tmp_path: Path, alone: Callable[[], None]
) -> None:
    """The user's file may be on the driver's machine only."""
    with pytest.raises(BackboneError) as told:
        make_stages(tmp_path, AsksForWeights).prepare(tiny_task)
    (shared,) = (tmp_path / "backbones").iterdir()
    assert str(told.value) == str(shared)
    shared.unlink()
    alone()
    with pytest.raises(BackboneError, match=r"^random$"):
        make_stages(tmp_path, AsksForWeights).prepare(tiny_task)
    assert not list((tmp_path / "backbones").iterdir())


def test_errors_of_the_checks_are_those_of_this_process(
    tiny_task: Task, tmp_path: Path, alone: Callable[[], None]
) -> None:
    """Nothing fits the budget; a part cannot run on the backbone, which a rehearsal shows."""
    deep = POINT_BACKBONE.model_copy(update={"arguments": {**ARGUMENTS, "depth": 4}})
    cut = {"adapter": {}, "from_block": 1}
    tasks = [
        tiny_task.model_copy(update={"budget": Budget(max_bytes=100)}),
        Task.model_validate({**SOLIDS, "backbone": deep, "recipe": cut}),
    ]

    def errors() -> list[TaskpackError]:
        found = []
        for task in tasks:
            with pytest.raises(TaskpackError) as told:
                make_stages(tmp_path, OfStudies).prepare(task)
            found.append(told.value)
        return found

    with driver_at_rest():
        there = errors()
    alone()
    here = errors()
    assert [type(error) for error in there] == [BudgetError, BackboneError]
    assert [(type(error), str(error)) for error in there] == [
        (type(error), str(error)) for error in here
    ]
    assert "from_block: later blocks read more of the earlier" in str(there[1])


class NotesTheTime(Stages):
    """Says from when to when a worker checked a task."""

    @staticmethod
    def check(inputs: Inputs) -> None:
        began = time.time()
        time.sleep(1)
        raise BackboneError(f"{began} {time.time()}")


def test_few_tasks_are_checked_at_the_same_time(tiny_task: Task, tmp_path: Path) -> None:
    """Each takes the memory of a training step."""
    stages = make_stages(tmp_path, NotesTheTime)
    tasks = [tiny_task.model_copy(update={"name": f"task{number}"}) for number in range(6)]

    def times(task: Task) -> list[float]:
        with pytest.raises(BackboneError) as told:
            stages.prepare(task)
        return [float(moment) for moment in str(told.value).split()]

    with ThreadPoolExecutor(len(tasks)) as pool:
        spans = list(pool.map(times, tasks))
    at_once = [sum(began <= start < ended for began, ended in spans) for start, _ in spans]
    assert max(at_once) <= CHECKED_AT_ONCE


# --- sizes ----------------------------------------------------------------------------------------


def test_a_worker_sizes_the_whole_space_to_the_byte(
    tiny_inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alone: Callable[[], None],
) -> None:
    task = tiny_inputs.task.model_copy(update={"search": SPACE})
    inputs = make_stages(tmp_path).with_shared_backbone(tiny_inputs.with_task(task))
    write_selection(select_locally(tiny_inputs, 2), selection := tmp_path / "selection")
    with driver_at_rest():
        there = sizes(inputs, selection, make_stages(tmp_path))
    assert len(set(there)) >= 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "LISTED_POINTS", 15)
        patch.setattr(planning, "listed_sizes", lambda *given: pytest.fail("too many"))
        assert sizes(inputs, selection, make_stages(tmp_path)) == there
    alone()
    assert sizes(inputs, selection, make_stages(tmp_path)) == there


def test_a_recipe_without_a_place_fails_when_it_is_proposed(
    tiny_inputs: Inputs, tmp_path: Path
) -> None:
    """A study that samples may never propose it."""
    search = SearchSpace(head_rank=(8, 65))
    inputs = tiny_inputs.with_task(tiny_inputs.task.model_copy(update={"search": search}))
    stages = make_stages(tmp_path)
    bytes_of = size_of(stages.with_shared_backbone(inputs), None, stages.elsewhere)
    fits, too_wide = (search.recipe(inputs.task.recipe, {"head_rank": rank}) for rank in (8, 65))
    assert bytes_of(fits) > 0
    with pytest.raises(BackboneError, match=r"head\.rank: given 65"):
        bytes_of(too_wide)


def test_a_worker_recomputes_a_selection(
    tiny_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Callable[[], None]
) -> None:
    task = tiny_inputs.task.model_copy(update={"selection": Selection(criterion="magnitude")})
    stages = make_stages(tmp_path)
    inputs = stages.with_shared_backbone(tiny_inputs.with_task(task))
    with driver_at_rest():
        there = stages.select(inputs, inputs.data_folder, 2).read_bytes()
    alone()
    other = make_stages(tmp_path / "here")
    monkeypatch.setattr(other, "workers_are_up", lambda ranks: None)
    assert other.select(inputs, inputs.data_folder, 2).read_bytes() == there


# --- a whole batch, and what goes wrong -----------------------------------------------------------


def test_the_driver_of_a_batch_computes_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From prepare to register, with a selection, a choice of two and a calibration."""
    data = {"format": "drawn", "kind": "orientation", "train_samples": 320, "test_samples": 20}
    recipe = {"connections": {"top_k": 1}, "training": {**TASK["recipe"]["training"], "epochs": 1}}
    changes = {"data": data, "recipe": recipe, "search": {"top_k": [1, 2]}, "coverage": 0.8}
    task = load_task(write_task(tmp_path, **changes))
    workdir = new_workdir(tmp_path_factory.getbasetemp(), tmp_path)
    with driver_at_rest():
        (outcome,) = run_batch([task], workdir, placement=Placement(per_trial=(1, 0)))
    assert outcome.error is None
    assert outcome.registered is not None
    (pack,) = workdir.glob("studies/bars-*/fits/*/calibrated.safetensors")
    (trial,) = [each for each in outcome.trials if each.id == outcome.champion_id]
    assert read_pack(pack).calibration is not None
    assert pack.stat().st_size == trial.size_bytes


class Overdue(Stages):
    """Stages whose time limit is over."""

    def is_stopping(self) -> bool:
        return True


def test_a_time_limit_that_is_over_still_lets_a_champion_be_chosen(tmp_path: Path) -> None:
    stages = make_stages(tmp_path, Overdue)
    assert stages.elsewhere(divmod, 7, 2) == (3, 1)
    stages.pool._stopping.set()
    with pytest.raises(Interrupted):
        stages.elsewhere(divmod, 7, 2)


def test_an_unforeseen_error_of_a_worker_comes_with_its_traceback(tmp_path: Path) -> None:
    compute = make_stages(tmp_path).elsewhere
    with pytest.raises(UnexpectedError, match=r"^ZeroDivisionError: ") as told:
        compute(divmod, 1, 0)
    assert "in _outcome" in told.value.details


def test_a_computation_whose_worker_dies_again_and_again_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "WORKER_RETRIES", 1)
    with pytest.raises(ClusterError, match=r"did not end: its worker died .* its memory suffices"):
        make_stages(tmp_path).elsewhere(os._exit, 1)
