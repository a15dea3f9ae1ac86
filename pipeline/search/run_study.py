"""Run a study's trials with Ray Tune, resumable at any time.

Tune supplies the workers, their placement, retries and stopping. Trials run in reused worker
processes, so backbone and decoded images are loaded once per process.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster.rank_group import WORKER_RETRIES, TrialResources, group
from pipeline.cluster.task_pool import Interrupted
from pipeline.cluster.tasks import bundles
from pipeline.errors import BudgetError, ClusterError, TaskpackError, TrainingError, named
from pipeline.kinds import Score
from pipeline.search.proposer import LAG, make_proposer
from pipeline.search.study import OnRecord, Study
from pipeline.search.time_limit import SearchTime, TimeLimit
from pipeline.search.trial import opened, run_trial
from pipeline.search.trial_record import (
    USAGE_FIELDS,
    TrialJournal,
    TrialRecord,
    failure_warnings,
)
from pipeline.specs import Recipe, Task
from pipeline.training import Ranks
from pipeline.training.ranks import RanksLost
from pipeline.training.usage import measured


def check_budget(task: Task, size_of: Callable[[Recipe], int]) -> None:
    """Raise BudgetError if nothing in the search space fits, before anything is requested from a
    cluster.
    """
    proposer = make_proposer(task, size_of)
    if proposer.propose() is None:
        raise _nothing_fits(task, proposer.rejected)


def run_study(
    task: Task,
    data_folder: Path,
    selection_path: Path | None,
    journal: TrialJournal,
    *,
    size_of: Callable[[Recipe], int],
    resources: Callable[[], TrialResources] = TrialResources,
    search_time: SearchTime | None = None,
    most_running: Callable[[], float] = lambda: math.inf,
    on_progress: OnRecord = lambda study: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> list[TrialRecord]:
    """Run every trial that has no record yet. Several studies may run at once, each in its thread.

    Args:
        size_of: size of a recipe's pack, in bytes.
        resources: called for the resources of a trial once one has to run; it must start Ray.
        search_time: the trials that a time limit leaves room for; default: no limit.
        most_running: called often for how many trials may run now; fewer may where they learn.
        is_stopping: whether the run was interrupted; running trials then end without a record.

    Raises:
        BudgetError: No configuration fits `max_bytes`.
        TaskpackError: Every trial failed.
        TimeLimitError: The time limit ended the search before a trial was complete.
        Interrupted: `is_stopping()` became true.
    """
    search_time = search_time or SearchTime(TimeLimit(), task.name)
    study = Study(task, make_proposer(task, size_of), journal)
    first = study.next_trial()
    if not study.proposals:
        raise _nothing_fits(task, study.all_records())
    if first is not None and search_time.may_start(study):
        _run_with_tune(
            study,
            first,
            data_folder,
            selection_path,
            resources(),
            search_time,
            most_running,
            on_progress,
            is_stopping,
        )
        gc.collect()  # Tune leaves cycles, which Python itself looks for once in fifty studies
    search_time.close(study)
    if search_time.is_cut:
        on_progress(study)
    return _records_of(study, search_time)


def _records_of(study: Study, search_time: SearchTime) -> list[TrialRecord]:
    """All records. Raises TaskpackError if no trial is complete."""
    records = study.all_records()
    if not any(record.state == "complete" for record in records):
        raise _nothing_complete(study, search_time)
    return records


def _nothing_complete(study: Study, search_time: SearchTime) -> TaskpackError:
    failed = [record for record in study.all_records() if record.state == "failed"]
    if search_time.is_cut and not failed:
        return search_time.too_short(study)
    kind = TrainingError if all(record.is_final for record in failed) else ClusterError
    reasons = "; ".join(failure_warnings(failed))[:800]
    return kind(f"{study.task.name}: no trial completed; {reasons}")


def _nothing_fits(task: Task, rejected: Sequence[TrialRecord]) -> BudgetError:
    smallest = min(rejected, key=lambda record: record.size_bytes)
    cure = "add smaller values of bits, top_k or experts"
    if task.search.configurations is not None:
        cure = (
            "leave out parts that the recipe names, or have fewer classes or shorter class names,"
            " which a pack holds"
        )
    point = ", ".join(f"{axis} {value}" for axis, value in smallest.point.items())
    return BudgetError(
        f"{task.name}: nothing in the search space fits the budget of {task.budget.max_bytes}"
        f" bytes; the smallest pack takes at least {smallest.size_bytes} ({point or 'the recipe'})."
        f" Raise budget.max_bytes, or {cure}"
    )


def _run_with_tune(
    study: Study,
    first: int,
    data_folder: Path,
    selection_path: Path | None,
    resources: TrialResources,
    search_time: SearchTime,
    most_running: Callable[[], float],
    on_progress: OnRecord,
    is_stopping: Callable[[], bool],
) -> None:
    """Run the remaining trials, as far as there is time."""
    _set_tune_options()
    from ray import tune

    from pipeline.search.tune import StoppingScheduler, StudySearcher, WhenOver

    context = {
        "task": study.task.model_dump_json(),
        "data_folder": str(data_folder),
        "selection": str(selection_path) if selection_path is not None else None,
        "resources": resources,
    }
    searcher = StudySearcher(
        study, first, on_progress, context, search_time, is_stopping, most_running
    )
    scratch = Path(tempfile.mkdtemp(prefix="taskpack-study-"))
    try:
        tune.Tuner(
            _registered_trainable(resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=StoppingScheduler(study, search_time),
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=study.task.name,
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
                stop=WhenOver(lambda: is_stopping() or search_time.is_over(study)),
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if is_stopping():
        raise Interrupted
    if searcher.fatal is not None:
        raise searcher.fatal


def _set_tune_options() -> None:
    """Set the options that Tune reads from the environment when it is imported or runs."""
    os.environ.update(
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        RAY_AIR_NEW_OUTPUT="0",
        # Tune would save the study every ten seconds to resume it, as it does from its records.
        TUNE_GLOBAL_CHECKPOINT_S="1000000000",
    )
    # Tune asks for one waiting trial at a time: short ones would follow each other in one worker,
    # and no other would ever start.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(LAG)


_REGISTERING = threading.Lock()


def _registered_trainable(resources: TrialResources) -> str:
    """The name under which `_trainable` is registered in Tune. All studies share it, so what
    differs between them is in a trial's config.
    """
    from ray import tune

    name = f"trial of {resources.ranks} x {resources.cpus:g} CPUs and {resources.gpus:g} GPUs"
    places = bundles(resources.ranks, resources.cpus, resources.gpus)
    request = tune.PlacementGroupFactory(
        places, strategy="PACK"
    )  # the trial itself takes the first
    with _REGISTERING:  # Tune's register is not safe to share between threads
        tune.register_trainable(name, tune.with_resources(_trainable, request))
    return name


def _trainable(config: dict[str, Any]) -> None:
    """Run one trial in a worker. Its errors are reported, not raised, because Tune would retry;
    only a lost rank is raised, to be retried.
    """
    from ray import tune

    resources: TrialResources = config["resources"]
    try:
        with (
            group(_follow, (config,), resources) as ranks,
            measured(resources.device()) as meter,
        ):
            for epoch, (score, remark) in enumerate(_epochs(config, resources, ranks), start=1):
                usage = meter.usage()
                tune.report(
                    {
                        "epoch": epoch,
                        "metric": score.value,
                        "standard_error": score.standard_error,
                        "remark": "; ".join(filter(None, [remark, usage.warning()])),
                        **{name: getattr(usage, name) for name in USAGE_FIELDS},
                    }
                )
    except RanksLost:
        raise
    except Exception as error:
        fault = named(error)
        # Tune refuses a report without the searcher's metric, and would end the whole study.
        tune.report(
            {
                "metric": 0.0,
                "error": type(fault).__name__,
                "message": str(fault),
                "details": getattr(fault, "details", ""),
            }
        )


def _follow(config: dict[str, Any], resources: TrialResources, ranks: Ranks) -> None:
    """Run the same trial on a rank that reports nothing."""
    for _ in _epochs(config, resources, ranks):
        pass


def _epochs(
    config: dict[str, Any], resources: TrialResources, ranks: Ranks
) -> Iterator[tuple[Score, str]]:
    device = resources.device()
    with opened(
        config["task"], config["recipe"], config["data_folder"], config["selection"], device
    ) as given:
        yield from run_trial(*given, device=device, ranks=ranks, kept=Path(config["kept"]))
