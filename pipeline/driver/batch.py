"""A batch: every task through prepare, select, search, fit and register, on one Ray.

Tasks are prepared as soon as possible, several concurrently, so that an error in the data of the
last one shows long before its turn. Of those that are prepared, as many run as fill the cluster.
The failure of one task never stops the others. Every stage writes its result to disk before the
next begins, so the same command after an interruption repeats nothing that was finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.cluster.capacity import places
from pipeline.cluster.rank_group import TrialResources
from pipeline.cluster.session import session_logs
from pipeline.cluster.task_pool import Interrupted
from pipeline.driver.calibrated import with_calibration
from pipeline.driver.monitor.batch_watch import BatchWatch, batch_name
from pipeline.driver.monitor.state import state_file_name
from pipeline.driver.planning import check_study, size_of
from pipeline.driver.retrying_registry import PATIENCE_SECONDS, RetryingRegistry
from pipeline.driver.stages import (
    LOG,
    OnProgress,
    Placement,
    Stage,
    Stages,
    named_errors,
    no_progress,
    work_folder,
)
from pipeline.driver.workspace import StudyFolder, Workspace
from pipeline.errors import TaskpackError
from pipeline.kinds.metrics import metric_named
from pipeline.registry.pack_record import (
    COVERAGE_TAG,
    DATA_TAG,
    FINGERPRINT_TAG,
    KIND_TAG,
    METRIC_TAG,
    MODALITY_TAG,
    VALIDATION_TAG,
    Champion,
    RegisteredPack,
    UsedData,
    metrics_by_class,
)
from pipeline.registry.store import open_registry
from pipeline.registry.trial_runs import SPEED_FIELD
from pipeline.reports.front_figure import draw_front
from pipeline.search.champion import choose_champion
from pipeline.search.pareto import pareto_front
from pipeline.search.proposer import mean_places
from pipeline.search.run_study import run_study
from pipeline.search.study import Study
from pipeline.search.time_limit import SearchTime, TimeLimit
from pipeline.search.trial_record import TrialRecord, failure_warnings
from pipeline.specs import Task
from pipeline.training import Inputs, open_inputs
from pipeline.training.fit import PACK_FILE, FitResult, read_fit
from pipeline.utils.files import await_file

if TYPE_CHECKING:
    from pipeline.registry.store import Registry


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """The outcome of one task: a registered pack, or an error and the stage in which it
    occurred. `trials_left` planned trials did not run because of the time limit.
    """

    task: str
    registered: RegisteredPack | None = None
    trials: tuple[TrialRecord, ...] = ()
    trials_left: int = 0
    champion_id: str | None = None
    front_figure: Path | None = None
    stage: Stage = "done"
    error: TaskpackError | None = None

    @property
    def ran(self) -> int:
        """How many trials ran: all but those over budget."""
        return sum(trial.state != "rejected" for trial in self.trials)

    def warnings(self) -> list[str]:
        """Warnings about trials that the time limit left out, the champion's training, and failed
        trials, which were not candidates.
        """
        cut = (
            [
                f"the time limit ended the search after {self.ran} of"
                f" {self.ran + self.trials_left} trials;"
                " the same command with a longer --time-limit, or none, runs the others"
            ]
            if self.trials_left
            else []
        )
        odd = [
            trial.message for trial in self.trials if trial.id == self.champion_id and trial.message
        ]
        return cut + odd + failure_warnings(self.trials)


def run_batch(
    tasks: Sequence[Task],
    workdir: Path,
    *,
    address: str | None = None,
    registry_uri: str | None = None,
    placement: Placement | None = None,
    time_limit_seconds: float | None = None,
    registry_patience_seconds: float = PATIENCE_SECONDS,
    log_trials: bool = True,
    promote: bool = False,
    on_progress: OnProgress = no_progress,
) -> list[TaskOutcome]:
    """Run every task to a registered pack; one outcome per task, in the order of `tasks`.
    Arguments that are not described here are those of `pipeline.run`.

    Args:
        workdir: folder for all results; on a cluster, every node must see it.
        address: of a Ray cluster; None starts a private one when a stage needs it.
        registry_uri: see `open_registry`.
        on_progress: called from one thread at a time.

    Raises:
        SpecError: `time_limit_seconds` is not a positive number.
        StorageError: The work folder cannot be used.
        RegistryError: The registry cannot be reached or written to.
        ClusterError: No cluster answers at `address`.
    """
    limit = TimeLimit(math.inf if time_limit_seconds is None else time_limit_seconds)
    with work_folder(workdir, address) as (workspace, start_ray):
        registry = open_registry(registry_uri, workspace.root, writer=workspace.writer())
        registry.check_writable()
        if address is not None:
            start_ray()
        with _watch(workspace, tasks, on_progress, on_cluster=address is not None) as watch:
            return _Driver(
                workspace=workspace,
                registry=registry,
                registry_patience_seconds=registry_patience_seconds,
                log_trials=log_trials,
                promote=promote,
                start_ray=start_ray,
                ray_is_private=address is None,
                placement=placement or Placement(),
                task_count=len(tasks),
                limit=limit,
                on_progress=watch.progress,
                watch=watch,
            ).run(tasks)


def _watch(
    workspace: Workspace, tasks: Sequence[Task], on_progress: OnProgress, *, on_cluster: bool
) -> BatchWatch:
    """The record of the batch's state; on a cluster with a copy where its jobs server finds it."""
    name = batch_name()
    copies = [session_logs() / state_file_name(name)] if on_cluster else []
    names = [task.name for task in tasks]
    return BatchWatch(workspace.root, name, names, copies=copies, on_progress=on_progress)


_Outcome = TypeVar("_Outcome")


PREPARED_AT_ONCE = 8
"""Tasks prepared concurrently: a store that does not answer delays its own task only."""


@dataclass(kw_only=True)
class _Driver(Stages):
    registry: Registry
    watch: BatchWatch
    limit: TimeLimit
    registry_patience_seconds: float
    log_trials: bool
    promote: bool
    retrying_registry: RetryingRegistry = field(init=False)
    started: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.retrying_registry = RetryingRegistry(
            self.registry,
            self.pool,
            self.registry_patience_seconds,
            with_trials=self.log_trials,
        )

    def run(self, tasks: Sequence[Task]) -> list[TaskOutcome]:
        """Run all tasks; the error of a task is part of its outcome."""
        self.check_gpus()
        return self.pool.run_prepared(
            lambda task: self._outcome(task, self.prepare),
            self._run_prepared,
            tasks,
            prepare_at_once=PREPARED_AT_ONCE,
        )

    def is_stopping(self) -> bool:
        """Whether the run was interrupted, or its time limit is over."""
        return super().is_stopping() or self.limit.is_over()

    check = staticmethod(check_study)

    def prepare(self, task: Task) -> Task:
        """As of every run; its resolved search space tells how many places the task takes."""
        prepared = super().prepare(task)
        self.places_of[task.name] = mean_places(prepared)
        return prepared

    def _outcome(self, task: Task, stages: Callable[[Task], _Outcome]) -> _Outcome | TaskOutcome:
        """Return the result of `stages`, or the outcome with the error that ended them."""
        try:
            with named_errors(self.workspace.log(task.name)), self._within_limit(task):
                return stages(task)
        except TaskpackError as error:
            self.on_progress(task.name, "failed", 1.0, str(error))
            stage = self.stage.get(task.name, "prepare")
            return TaskOutcome(task=task.name, stage=stage, error=error)

    @contextlib.contextmanager
    def _within_limit(self, task: Task) -> Iterator[None]:
        """Raise TimeLimitError if no time is left to begin a task or its search."""
        self.limit.check_can_begin(task.name)
        try:
            yield
        except Interrupted:
            if self.pool.is_stopping():
                raise
            raise self.limit.over(task.name, self.stage[task.name]) from None
        finally:
            self.limit.release(task.name)

    def _run_prepared(self, task: Task | TaskOutcome) -> TaskOutcome:
        """Run a task unless its preparation has failed."""
        if isinstance(task, TaskOutcome):
            return task
        outcome = self._outcome(task, self._stages)
        if outcome.error is None:
            self.on_progress(task.name, "done", 1.0, "")
        return outcome

    def _stages(self, task: Task) -> TaskOutcome:
        self.started[task.name] = time.time()
        data_folder = self.workspace.data(task.name)
        with self.here:
            inputs = self.with_shared_backbone(open_inputs(task, data_folder))
        task = inputs.task
        top_k = task.search.max_top_k(task.recipe)
        folder = self.workspace.study(inputs, top_k)
        selection = self.select(inputs, data_folder, top_k) if top_k else None
        search_time = SearchTime(self.limit, task.name, inputs.fit_ratio)
        trials = self._search(inputs, data_folder, selection, folder, search_time)
        not_worse = self.elsewhere(choose_champion, trials, task, folder.journal.outcomes)
        champion = not_worse[0]
        self.watch.searched(task.name, trials, champion, search_time.trials_left)
        self._draw(task, trials, not_worse, folder.figure)
        if read_fit(folder.fit(champion.id)) is None:
            search_time.check_fit(trials)
        fitted = self._fit(inputs, data_folder, champion, selection, folder)
        pack_path = folder.fit(champion.id) / PACK_FILE
        if task.coverage is not None:
            outcomes = partial(folder.journal.outcomes, champion.id)
            pack_path, fitted = self.elsewhere(
                with_calibration, pack_path.parent, fitted, outcomes, task.coverage
            )
            await_file(pack_path)
        self.enter(task, "register")
        finished = replace(
            _describe(inputs, champion, trials, fitted, pack_path, folder, self.started[task.name]),
            promote=self.promote,
        )
        registered = self.retrying_registry.register(
            finished, lambda reason: self.on_progress(task.name, "register", 0.0, reason)
        )
        self.watch.registered(task.name, champion.id, registered)
        LOG.info("%s: registered as %s; %s", task.name, registered.reference, registered.remark)
        return TaskOutcome(
            task=task.name,
            registered=registered,
            trials=tuple(trials),
            trials_left=search_time.trials_left,
            champion_id=champion.id,
            front_figure=folder.figure,
        )

    def _draw(
        self,
        task: Task,
        trials: Sequence[TrialRecord],
        not_worse: Sequence[TrialRecord],
        figure: Path,
    ) -> None:
        draw = partial(
            draw_front,
            title=f"{task.name}: validation {task.metric} against the pack's size",
            metric=task.metric,
            max_bytes=task.budget.max_bytes,
            champion=not_worse[0].id,
            not_worse={trial.id for trial in not_worse},
            finer=metric_named(task.metric, task.kind).finer,
        )
        self.elsewhere(draw, [trial.row() for trial in trials], figure)
        await_file(figure)

    def _search(
        self,
        inputs: Inputs,
        data_folder: Path,
        selection: Path | None,
        folder: StudyFolder,
        search_time: SearchTime,
    ) -> list[TrialRecord]:
        task = inputs.task
        self.enter(task, "search")

        def report(study: Study) -> None:
            self.watch.study(
                study,
                samples=inputs.trained_samples,
                fit_samples=len(inputs.splits["trainval"]),
            )
            self.on_progress(
                task.name,
                "search",
                min(1.0, study.epochs_done() / study.trials_planned()),
                study.remark(),
            )

        def resources() -> TrialResources:
            found = self.trial_resources(inputs, selection)
            self.limit.places = max(1, places(found.cpus, found.gpus) // found.ranks)
            return found

        return run_study(
            task,
            data_folder,
            selection,
            folder.journal,
            size_of=size_of(inputs, selection, self.elsewhere),
            resources=resources,
            search_time=search_time,
            most_running=self.trials_at_once_of_each,
            on_progress=report,
            is_stopping=self.pool.is_stopping,
        )

    def _fit(
        self,
        inputs: Inputs,
        data_folder: Path,
        champion: TrialRecord,
        selection: Path | None,
        folder: StudyFolder,
    ) -> FitResult:
        task = inputs.task
        self.enter(task, "fit")
        done = read_fit(folder.fit(champion.id))
        if done is not None:
            return done
        recipe = task.search.recipe(task.recipe, champion.point)
        arguments = (
            task.model_dump_json(),
            recipe.model_dump_json(),
            str(data_folder),
            selection,
            folder.fit(champion.id),
        )
        ((_, result),) = self.fits([arguments], self.ranks(inputs))
        if isinstance(result, TaskpackError):
            raise result
        await_file(folder.fit(champion.id) / PACK_FILE)
        LOG.info("%s: fit: %s", task.name, result.line())
        return result


def _describe(
    inputs: Inputs,
    champion: TrialRecord,
    trials: Sequence[TrialRecord],
    fitted: FitResult,
    pack_path: Path,
    folder: StudyFolder,
    started: float,
) -> Champion:
    """Describe a finished pack for the registry. The task started with its first trial, which may
    belong to an earlier run.
    """
    task = inputs.task
    started = min([started, *(trial.ended - trial.seconds for trial in trials if trial.ended)])
    assert champion.val_metric is not None
    return Champion(
        task=task.name,
        pack_path=pack_path,
        pack_digest=fitted.pack_digest,
        size_bytes=fitted.size_bytes,
        ledger=fitted.ledger,
        metrics={
            "test_metric": fitted.test_metric,
            "test_metric_stderr": fitted.test_metric_stderr,
            "val_metric": champion.val_metric,
            "trained_values": fitted.trained_values,
            "search_seconds": sum(trial.seconds for trial in trials),
            "fit_seconds": fitted.train_seconds,
            **metrics_by_class(task.metric, fitted.test_by_class),
        },
        params=flatten(
            task.search.recipe(task.recipe, champion.point).model_dump(exclude_none=True)
        ),
        tags={**_tags(inputs), "trial": champion.id, "device": fitted.device},
        front=[_row(trial, inputs.trained_samples) for trial in trials],
        on_front=tuple(row["id"] for row in pareto_front([trial.row() for trial in trials])),
        front_figure=folder.figure,
        outcomes=folder.journal.outcomes_path(champion.id),
        level=task.budget.level,
        data=_used_data(inputs),
        started=datetime.fromtimestamp(started, UTC),
    )


def _row(trial: TrialRecord, samples: int) -> dict[str, Any]:
    """A trial as plain data, with its speed."""
    return {**trial.row(), SPEED_FIELD: trial.images_per_second(samples)}


def _tags(inputs: Inputs) -> dict[str, str]:
    """What a pack's tags say of its task."""
    task = inputs.task
    return {
        KIND_TAG: task.kind,
        METRIC_TAG: task.metric,
        "backbone": task.backbone.model,
        FINGERPRINT_TAG: inputs.backbone.fingerprint,
        DATA_TAG: inputs.index.digest,
        VALIDATION_TAG: _validation(inputs),
        "description": task.description,
        **({} if task.coverage is None else {COVERAGE_TAG: str(task.coverage)}),
        **({} if task.modality == "images" else {MODALITY_TAG: task.modality}),
    }


def _used_data(inputs: Inputs) -> tuple[UsedData, ...]:
    """The datasets train, validation and test, with their sources."""
    data, classes = inputs.task.data, len(inputs.index.classes)
    sources = {
        split: getattr(data, split, None) or getattr(data, "train", None) or data.format
        for split in ("train", "val", "test")
    }
    digest = inputs.index.digest
    return tuple(
        UsedData(
            split=split,
            source=str(source),
            digest=digest,
            samples=len(inputs.splits[split]),
            classes=classes,
        )
        for split, source in sources.items()
    )


def _validation(inputs: Inputs) -> str:
    """Hash of the validation samples and the metric: validation metrics are comparable only if it
    is equal.
    """
    held_out = hashlib.sha256(f"{inputs.index.digest} {inputs.task.metric}".encode())
    for fold in inputs.folds:
        held_out.update(fold.splits["val"].samples.tobytes())
    return held_out.hexdigest()[:16]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings to `part.key` and text, for the parameters of a run."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": str(value)}
        )
    return flat
