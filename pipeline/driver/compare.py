"""Methods side by side: tuned on validation, then fitted and tested once per seed.

Every method tries the same share of its search space, by default all of it. A fixed number of
trials would search a method of 4 points exhaustively and one of 20 by chance, and so favour the
smaller space.

All trials of a task, of all methods, are in the cluster's queue at once; none is stopped early,
since methods differ in how fast they learn. The trial with the best validation metric is a
method's; its recipe is fitted for each seed, and each pack reads the test set once, as reloaded
from its file. All trials of a method make a front of the validation metric against bytes, and the
BD-rate compares it with the front of a reference method. Finished work is kept in the work folder,
so the same command continues after an interruption.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from pipeline.cluster.rank_group import TrialResources, in_group
from pipeline.driver.comparison_time import ComparisonTime, in_turn
from pipeline.driver.planning import check_parts, size_of
from pipeline.driver.stages import (
    LOG,
    OnProgress,
    Placement,
    Stages,
    named_errors,
    no_progress,
    one_at_a_time,
    work_folder,
)
from pipeline.driver.workspace import StudyFolder
from pipeline.errors import SpecError, TaskpackError, TrainingError, UnexpectedError
from pipeline.kinds import Score
from pipeline.reports.bd_rate import Curve, compare_curves
from pipeline.reports.comparison_row import Comparison
from pipeline.search.time_limit import TimeLimit
from pipeline.search.trial import opened, recipe_key, run_trial
from pipeline.search.trial_record import TrialRecord, failure_warnings
from pipeline.specs import Method, Recipe, SearchSpace, Task, first_fault
from pipeline.training import Inputs, Ranks, open_inputs
from pipeline.training.fit import FitResult, read_fit
from pipeline.utils.files import explained


@dataclass
class _Entry:
    """One method on one task while it is compared."""

    method: str
    inputs: Inputs
    selection: Path | None = None
    folder: StudyFolder | None = None
    records: dict[str, TrialRecord] = field(default_factory=dict)
    recipes: dict[str, tuple[dict[str, Any], Recipe, int]] = field(default_factory=dict)
    fits: list[FitResult] = field(default_factory=list)
    error: str = ""

    @property
    def task(self) -> Task:
        return self.inputs.task

    def warnings(self) -> list[str]:
        """Which trials failed, and how many ran if the time limit has left out others."""
        tried, planned = len(self.records), len(self.recipes)
        left_out = [f"{tried} of {planned} trials ran in the time limit"] if tried < planned else []
        return [*failure_warnings(list(self.records.values())), *left_out]

    def best(self) -> TrialRecord:
        """The trial with the best validation metric; of equal ones the smallest pack."""
        complete = [record for record in self.records.values() if record.val_metric is not None]
        if not complete:
            raise TrainingError(f"no trial completed; {'; '.join(self.warnings())}")
        return max(
            complete, key=lambda record: (record.val_metric or 0.0, -record.size_bytes, record.id)
        )

    def curve(self) -> Curve | None:
        """The complete trials whose validation outputs are kept; None where there are none."""
        assert self.folder is not None
        trials = [
            (record.size_bytes, outcomes)
            for record in self.records.values()
            if record.val_metric is not None
            and (outcomes := self.folder.compared.outcomes(record.id)) is not None
        ]
        if not trials:
            return None
        metric = self.inputs.metric
        return Curve(
            np.array([size_bytes for size_bytes, _ in trials], dtype=np.float64),
            np.array([metric.value(outcomes) for _, outcomes in trials]),
            np.stack([metric.resampled(outcomes) for _, outcomes in trials], axis=1),
        )


def compare_methods(
    tasks: Sequence[Task],
    methods: Mapping[str, Method],
    workdir: Path,
    *,
    seeds: int = 3,
    fraction: float = 1.0,
    reference: str | None = None,
    address: str | None = None,
    placement: Placement | None = None,
    time_limit_seconds: float | None = None,
    on_progress: OnProgress = no_progress,
) -> list[Comparison]:
    """Compare `methods` on `tasks`; one row for each pair, task by task.

    Args:
        workdir: keeps every trial and pack; on a cluster it must be a folder that every node sees.
        seeds: fits of every method; they differ in initial values, batches and augmentation, and
            share selection and splits.
        fraction: share of each method's search space to try, above 0 and at most 1; at least one
            point per method. The same points in every run; a larger share includes a smaller one.
        reference: the method that BD-rates are relative to; by default the first.
        time_limit_seconds: wall-clock limit for all tasks. Every method then tries a smaller share
            of its space, so that the fits still fit; without it later, the others run.

    Raises:
        SpecError: `fraction` is out of range, `time_limit_seconds` is not a positive number,
            `reference` is none of the methods, or a method's settings do not fit a task's.
        DataError, BackboneError: a task cannot be used. A method that fails, or that a backbone has
            no place for, is a row with an error.
    """
    _check(methods, tasks, fraction, reference)
    limit = TimeLimit(math.inf if time_limit_seconds is None else time_limit_seconds)
    with work_folder(workdir, address) as (workspace, start_ray):
        if address is not None:
            start_ray()
        driver = _Driver(
            workspace=workspace,
            start_ray=start_ray,
            ray_is_private=address is None,
            placement=placement or Placement(),
            limit=limit,
            on_progress=one_at_a_time(on_progress),
        )
        driver.check_gpus()
        prepared = [driver.open(task) for task in tasks]
        compared = driver.pool.run(
            lambda inputs: driver.compare(inputs, methods, seeds, fraction, reference), prepared
        )
        return list(itertools.chain.from_iterable(compared))


def _check(
    methods: Mapping[str, Method], tasks: Sequence[Task], fraction: float, reference: str | None
) -> None:
    """Raise SpecError if `fraction` is out of range, `reference` is not among the methods, or the
    settings of a method do not fit those of a task.
    """
    if not 0 < fraction <= 1:
        raise SpecError(
            f"--fraction: given {fraction:g}, expected a share of each method's search space, "
            "above 0 and at most 1; 0.5 tries half of the points, 1 all"
        )
    if reference is not None and reference not in methods:
        raise SpecError(
            f"--reference: {reference} is not compared; expected one of {', '.join(methods)}"
        )
    for name, method in methods.items():
        for task in tasks:
            try:
                method.on(task)
            except ValidationError as error:
                raise SpecError(f"{name}: on the task {task.name}: {first_fault(error)}") from None


def sampled_points(space: SearchSpace, fraction: float, seed: int) -> list[dict[str, Any]]:
    """The share `fraction` of a space's points, rounded, at least one; all of them in their order.

    The points of a smaller share are among those of a larger one, so trials are kept.
    """
    points = list(space.points())
    if fraction < 1:
        random.Random(seed).shuffle(points)
    return points[: max(1, round(fraction * len(points)))]


@dataclass(kw_only=True)
class _Driver(Stages):
    limit: TimeLimit

    def open(self, task: Task) -> Inputs:
        """The prepared task, as workers get it."""
        with named_errors(self.workspace.log(task.name)):
            resolved, folder = self.prepare(task), self.workspace.data(task.name)
            return self.with_shared_backbone(open_inputs(resolved, folder))

    def compare(
        self,
        inputs: Inputs,
        methods: Mapping[str, Method],
        seeds: int,
        fraction: float,
        reference: str | None,
    ) -> list[Comparison]:
        """All methods on one task."""
        entries = [
            _Entry(name, inputs.with_task(method.on(inputs.task)))
            for name, method in methods.items()
        ]
        task = inputs.task.name
        with named_errors(self.workspace.log(task)):
            for entry in entries:
                _guarded(entry, lambda _: self.limit.check_can_begin(task))
            for entry in (entry for entry in entries if not entry.error):
                _guarded(entry, self._plan_trials, fraction)
            self._tune(inputs, [entry for entry in entries if not entry.error], seeds)
            self._test(inputs, [entry for entry in entries if not entry.error], seeds)
        self.limit.release(task)
        self.on_progress(inputs.task.name, "done", 1.0, "")
        return _with_bd_rates(entries, [_row(entry) for entry in entries], reference)

    def _plan_trials(self, entry: _Entry, fraction: float) -> None:
        """What the method tries, what each costs, which connections it may change."""
        task = entry.task
        top_k = task.search.max_top_k(task.recipe)
        self.elsewhere.on(entry.inputs, check_parts)
        entry.folder = self.workspace.study(entry.inputs, top_k)
        entry.selection = (
            self.select(entry.inputs, entry.inputs.data_folder, top_k) if top_k else None
        )
        bytes_of = size_of(entry.inputs, entry.selection, self.elsewhere)
        for point in sampled_points(task.search, fraction, task.seed):
            recipe = task.search.recipe(task.recipe, point)
            entry.recipes[recipe_key(recipe)] = (point, recipe, bytes_of(recipe))
        known = entry.folder.compared.read()
        entry.records = {key: known[key] for key in entry.recipes if key in known}

    def _tune(self, inputs: Inputs, entries: Sequence[_Entry], seeds: int) -> None:
        """Run every trial that has no record, or those that there is time for."""
        self.enter(inputs.task, "search")
        keys = [list(entry.recipes) for entry in entries]
        turns = in_turn([len(each) for each in keys], inputs.task.seed)
        jobs = [(entries[method], keys[method][number]) for method, number in turns]
        jobs = [(entry, key) for entry, key in jobs if key not in entry.records]
        time_left = ComparisonTime(
            self.limit, inputs.task.name, seeds * len(entries), inputs.fit_ratio
        )
        while jobs:
            records = [record for entry in entries for record in entry.records.values()]
            at_once = self.trials_at_once(inputs) if self.limit.exists else 1
            count = time_left.startable(len(jobs), records, at_once)
            if not count:
                break
            self._try(inputs, entries, jobs[:count])
            jobs = jobs[count:]
        for entry in entries:
            if not entry.records:
                entry.error = str(self.limit.over(inputs.task.name, "search"))

    def _try(
        self, inputs: Inputs, entries: Sequence[_Entry], jobs: Sequence[tuple[_Entry, str]]
    ) -> None:
        """Run these trials, all in the cluster's queue at once."""
        task = inputs.task
        arguments = [self._trial_arguments(entry, key) for entry, key in jobs]
        planned = sum(len(entry.recipes) for entry in entries)
        for index, outcome in self.on_ray(_trial_worker, arguments, self.ranks(inputs)):
            entry, key = jobs[index]
            assert entry.folder is not None
            record = entry.records[key] = _record(key, entry, outcome)
            entry.folder.compared.write(record)
            done = sum(len(each.records) for each in entries)
            LOG.info(
                "%s: trial %d of %d: %s, %s",
                task.name,
                done,
                planned,
                entry.method,
                record.line(),
            )
            remark = f"{done} of {planned} trials, last {entry.method}"
            self.on_progress(task.name, "search", done / planned, remark)

    def _test(self, inputs: Inputs, entries: Sequence[_Entry], seeds: int) -> None:
        task = inputs.task
        self.enter(task, "fit")
        for entry in entries:
            _guarded(entry, _Entry.best)
        entries = [entry for entry in entries if not entry.error]
        jobs = [(entry, seed) for entry in entries for seed in range(seeds)]
        missing = [
            (entry, seed) for entry, seed in jobs if read_fit(_fit_folder(entry, seed)) is None
        ]
        arguments = [self._fit_arguments(entry, seed) for entry, seed in missing]
        for done, (index, outcome) in enumerate(self.fits(arguments, self.ranks(inputs)), start=1):
            entry, seed = missing[index]
            if isinstance(outcome, TaskpackError):
                entry.error = explained(
                    outcome, self.workspace.log(task.name), f"fit of {entry.method}, seed {seed}"
                )
            ended = (
                f"failed - {entry.error}" if isinstance(outcome, TaskpackError) else outcome.line()
            )
            LOG.info(
                "%s: fit %d of %d: %s, seed %d, %s",
                task.name,
                len(jobs) - len(missing) + done,
                len(jobs),
                entry.method,
                seed,
                ended,
            )
            self.on_progress(
                task.name,
                "fit",
                done / len(missing),
                f"{done} of {len(missing)} fits, last {entry.method}",
            )
        for entry, seed in jobs:
            fitted = read_fit(_fit_folder(entry, seed))
            entry.fits += [fitted] if fitted is not None else []

    def _trial_arguments(self, entry: _Entry, key: str) -> tuple[Any, ...]:
        assert entry.folder is not None
        return (
            entry.task.model_dump_json(),
            entry.recipes[key][1].model_dump_json(),
            str(entry.inputs.data_folder),
            entry.selection,
            entry.folder.compared.outcomes_path(key),
        )

    def _fit_arguments(self, entry: _Entry, seed: int) -> tuple[Any, ...]:
        task = entry.task.model_copy(update={"seed": entry.task.seed + seed})
        recipe = entry.recipes[entry.best().id][1]
        return (
            task.model_dump_json(),
            recipe.model_dump_json(),
            str(entry.inputs.data_folder),
            entry.selection,
            _fit_folder(entry, seed),
        )


def _guarded(entry: _Entry, action: Callable[..., Any], *arguments: Any) -> None:
    """Do something for one entry. A named error is kept in the entry, and the others continue."""
    try:
        action(entry, *arguments)
    except TaskpackError as error:
        entry.error = str(error)


def _trial_worker(
    task_json: str,
    recipe_json: str,
    data_folder: str,
    selection: Path | None,
    kept: Path,
    resources: TrialResources,
) -> tuple[Any, ...] | TaskpackError:
    """Validation score after each epoch, a remark, and seconds; a named error is returned, so that
    Ray does not try again.
    """
    started = time.monotonic()
    epochs = in_group(_trial, (task_json, recipe_json, data_folder, selection, kept), resources)
    if isinstance(epochs, TaskpackError):
        return epochs
    return [score for score, _ in epochs], epochs[-1][1], time.monotonic() - started


def _trial(
    task_json: str,
    recipe_json: str,
    data_folder: str,
    selection: Path | None,
    kept: Path,
    resources: TrialResources,
    ranks: Ranks,
) -> list[tuple[Score, str]]:
    with opened(task_json, recipe_json, data_folder, selection, resources.device()) as given:
        return list(run_trial(*given, device=resources.device(), ranks=ranks, kept=kept))


def _record(key: str, entry: _Entry, outcome: Any) -> TrialRecord:
    assert entry.folder is not None
    point, _, size_bytes = entry.recipes[key]
    if isinstance(outcome, TrainingError | UnexpectedError):
        return TrialRecord(
            id=key,
            point=point,
            size_bytes=size_bytes,
            **entry.folder.compared.failure(key, outcome),
        )
    if isinstance(outcome, TaskpackError):
        raise outcome
    scores, remark, seconds = outcome
    curve, errors = (
        tuple(score.value for score in scores),
        tuple(score.standard_error for score in scores),
    )
    return TrialRecord(
        id=key,
        point=point,
        size_bytes=size_bytes,
        state="complete",
        val_metric=curve[-1],
        curve=curve,
        errors=errors,
        seconds=round(seconds, 2),
        message=remark,
    )


def _fit_folder(entry: _Entry, seed: int) -> Path:
    assert entry.folder is not None
    return entry.folder.fit(entry.best().id if seed == 0 else f"{entry.best().id}-seed{seed}")


def _with_bd_rates(
    entries: Sequence[_Entry], rows: Sequence[Comparison], reference: str | None
) -> list[Comparison]:
    """The rows with each method's BD-rate relative to the method `reference`, or to the first."""
    chosen = next(entry for entry in entries if reference in (None, entry.method))
    curve = None if chosen.error else chosen.curve()
    compared = []
    for entry, row in zip(entries, rows, strict=True):
        own = None if entry.error or entry is chosen else entry.curve()
        found = compare_curves(curve, own) if curve is not None and own is not None else None
        if found is not None:
            error = None if math.isnan(found.standard_error) else found.standard_error
            row = replace(row, bd_rate=found.value, bd_rate_error=error)
        compared.append(row)
    return compared


def _row(entry: _Entry) -> Comparison:
    if entry.error:
        return Comparison(
            task=entry.task.name, method=entry.method, metric=entry.task.metric, error=entry.error
        )
    best = entry.best()
    return Comparison(
        task=entry.task.name,
        method=entry.method,
        metric=entry.task.metric,
        point=best.point,
        trials=len(entry.records),
        size_bytes=entry.fits[0].size_bytes,
        trained_values=entry.fits[0].trained_values,
        val_metric=best.val_metric,
        test_metrics=tuple(fitted.test_metric for fitted in entry.fits),
        test_errors=tuple(fitted.test_metric_stderr for fitted in entry.fits),
        test_samples=entry.fits[0].test_samples,
        tune_seconds=math.fsum(record.seconds for record in entry.records.values()),
        fit_seconds=sum(fitted.train_seconds for fitted in entry.fits),
        device=entry.fits[0].device,
        warning="; ".join(entry.warnings()),
    )
