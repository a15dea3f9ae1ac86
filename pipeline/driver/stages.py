"""The stages that a batch and a comparison share: data, backbone for workers, selection, fits in
workers, named errors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.adaptation import is_recomputable
from pipeline.backbones import share
from pipeline.backbones.known import remember
from pipeline.cluster.capacity import (
    check_holds_group,
    cpus_per_trial,
    gpu_kinds,
    has_gpus,
    most_trials_per_gpu,
    places,
    scales_itself,
    wait_for_room,
)
from pipeline.cluster.gpu_check import check_gpus_of_workers
from pipeline.cluster.rank_group import WORKER_RETRIES, TrialResources, on_ranks
from pipeline.cluster.session import interruptible, is_connected, ray_session
from pipeline.cluster.task_pool import LOOK_SECONDS, TaskPool
from pipeline.cluster.tasks import ended_tasks
from pipeline.data import prepare, remarks_on
from pipeline.data.node_memory import node_memory
from pipeline.driver.elsewhere import AGAIN, Elsewhere, named_deaths
from pipeline.driver.gpu_shares import GpuShares
from pipeline.driver.planning import resolved
from pipeline.driver.workspace import Workspace
from pipeline.errors import ClusterError, SpecError, TaskpackError, UnexpectedError, named
from pipeline.inputs.task_inputs import open_unresolved
from pipeline.search.proposer import LAG, most_at_once
from pipeline.search.trial import opened
from pipeline.selection import select, select_locally_if_faster
from pipeline.specs import Task
from pipeline.training import Inputs, Ranks, open_inputs
from pipeline.training.fit import FitResult, fit, steps_kept
from pipeline.utils.devices import check_gpus_usable
from pipeline.utils.files import await_file, exclusive, explained

LOG = logging.getLogger("taskpack")
"""One line per trial and fit that has ended. The command line prints them if there is no
terminal.
"""
SLACK = 2.0
"""So many times the tasks that fill a cluster on average hold 95 % of it, as `benchmarks/scale.py`
plays it.
"""
CHECKED_AT_ONCE = 2
"""Tasks that workers check concurrently: each takes the memory of a training step on a CPU, perhaps
on the same node.
"""
_NO_MORE = "more would lack CPUs, or leave other GPUs idle"

Stage = Literal["prepare", "select", "search", "fit", "register", "done", "failed"]
OnProgress = Callable[[str, Stage, float, str], None]
"""Called with task, stage, fraction of the stage done (0 to 1) and a short remark."""


def no_progress(task: str, stage: Stage, share: float, remark: str) -> None:
    """Report nothing."""


def one_at_a_time(on_progress: OnProgress) -> OnProgress:
    """Make a callback thread-safe."""
    lock = threading.Lock()

    def report(task: str, stage: Stage, share: float, remark: str) -> None:
        with lock:
            on_progress(task, stage, share, remark)

    return report


@contextlib.contextmanager
def work_folder(
    workdir: Path, address: str | None
) -> Iterator[tuple[Workspace, Callable[[], None]]]:
    """Lock the work folder of a run, and provide a function that starts its Ray: that at `address`,
    or a private one, until the context exits.

    Raises:
        StorageError: The work folder cannot be used.
    """
    workspace = Workspace(workdir.resolve())
    with exclusive(workspace.root), contextlib.ExitStack() as stack:
        workspace.clear_leftovers()
        stack.enter_context(node_memory().held())
        yield workspace, functools.cache(lambda: stack.enter_context(ray_session(address)))


@dataclass(frozen=True)
class Placement:
    """The resources that a run requests from its cluster.

    Args:
        per_trial: CPUs and GPUs per rank of a trial and of a fit; None takes one GPU if the cluster
            has any, which trials of a study may share (`Stages.trial_resources`), and the CPUs that
            `cpus_per_trial` says.
        ranks_per_trial: processes that train each trial and fit together, but at most the number of
            shards of the training set.
        selection_workers: ranks of the selection's worker group; None takes an equal share of the
            cluster's GPUs, or of its CPUs if it has none, or a single process if that is faster.
        tasks_at_once: tasks to run concurrently; None takes one more than the number whose trials
            fill the cluster.
    """

    per_trial: tuple[float | None, float | None] = (None, None)
    ranks_per_trial: int = 1
    selection_workers: int | None = None
    tasks_at_once: int | None = None

    def __post_init__(self) -> None:
        gpus = self.per_trial[1] or 0
        if gpus > 1:
            raise SpecError(
                f"--gpus-per-trial: given {gpus:g}; a process uses one GPU: give 1, or a share of"
                " one such as 0.5. For more of them a trial, give --ranks-per-trial"
            )
        if self.ranks_per_trial > 1 and 0 < gpus < 1:
            raise SpecError(
                f"--gpus-per-trial: given {gpus:g} with --ranks-per-trial {self.ranks_per_trial};"
                " ranks would share a GPU and gain nothing: give 1 or 0, or one rank a trial"
            )


@dataclass(kw_only=True)
class Stages:
    """The stages before any recipe is tried, in one work folder on one Ray. Several tasks may run
    concurrently, each in its thread.

    Args:
        start_ray: starts Ray unless it runs.
        task_count: how many tasks the run has.
        places_of: how many places each task's study takes on average, as far as it is known.
        trials_per_gpu: how many trials of each task's study share a GPU, as far as it is known.
        here: lock of computations in this process: one thread at a time, because seeds and thread
            counts are global.
        checking: limits how many tasks are checked at the same time.
    """

    workspace: Workspace
    start_ray: Callable[[], None]
    ray_is_private: bool
    placement: Placement
    on_progress: OnProgress
    task_count: int = 1
    pool: TaskPool = field(init=False)
    gpu_shares: GpuShares = field(init=False)
    elsewhere: Elsewhere = field(init=False)
    here: threading.Lock = field(default_factory=threading.Lock)
    checking: threading.Semaphore = field(
        default_factory=lambda: threading.Semaphore(CHECKED_AT_ONCE)
    )
    places_of: dict[str, float] = field(default_factory=dict)
    trials_per_gpu: dict[str, int] = field(default_factory=dict)
    stage: dict[str, Stage] = field(default_factory=dict)
    _looked: float = field(init=False, default=-math.inf)
    _seen_places: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.pool = TaskPool(self.tasks_at_once)
        self.elsewhere = Elsewhere(self.ray_is_private, self.pool.is_stopping, self.here)
        self.gpu_shares = GpuShares(self.workspace.gpu_needs, self.is_stopping)

    def is_stopping(self) -> bool:
        """Whether what runs before the fits should end as soon as it can."""
        return self.pool.is_stopping()

    def check_gpus(self) -> None:
        """Raise ClusterError if the run would be assigned GPUs that torch cannot use: those of this
        machine if Ray is private, otherwise those of the cluster.
        """
        if self.ray_is_private:
            check_gpus_usable(self.placement.per_trial[1])
        elif self.placement.per_trial[1] != 0:
            check_gpus_of_workers()

    def ray_is_up(self) -> None:
        """Start Ray unless it runs, in the main thread, because Ray sets signal handlers."""
        self.pool.on_main_thread(self.start_ray)

    def tasks_at_once(self) -> int:
        """How many tasks may run now: one more than fill the cluster, whose trials run while others
        select and fit.

        One until Ray is up, because perhaps nothing is left to run.
        """
        if self.placement.tasks_at_once is not None:
            return self.placement.tasks_at_once
        if not is_connected():
            return 1
        return 1 + math.ceil(self._places() / self._places_per_task())

    def trials_at_once_of_each(self) -> float:
        """How many trials of each study may run now, where they need not wait for results: its
        share of the cluster, and some more, because others select, fit or end meanwhile. Where many
        tasks run, few trials of each do, so that the next ones find workers that are started. On a
        cluster that grows on demand all may, since it grows by what waits.

        It looks at the cluster once a second, however often it is called.
        """
        now = time.monotonic()
        if now >= self._looked + LOOK_SECONDS:
            self._looked = now
            self._seen_places = math.inf if scales_itself() else self._places()
        return max(LAG, SLACK * self._seen_places / max(1, self.pool.running))

    def _places(self) -> float:
        """How many trials the cluster can hold, by how many share a GPU as far as it is known."""
        shares = list(self.trials_per_gpu.values())
        per_gpu = sum(shares) / len(shares) if shares else 1
        return places(*self._per_trial(per_gpu)) / self.placement.ranks_per_trial

    def _places_per_task(self) -> float:
        """How many trials of a task run at the same time, on average, less a part, because studies
        end unevenly.
        """
        known = list(self.places_of.values())
        return sum(known) / len(known) / SLACK if known else LAG

    def _per_trial(self, per_gpu: float = 1) -> tuple[float, float]:
        """CPUs and GPUs per rank; unless the user said how many GPUs, so many trials share one."""
        cpus, gpus = self.placement.per_trial
        gpus = has_gpus() / per_gpu if gpus is None else gpus
        return cpus_per_trial(gpus) if cpus is None else cpus, gpus

    def enter(self, task: Task, stage: Stage) -> None:
        """Report the stage of a task."""
        self.stage[task.name] = stage
        self.on_progress(task.name, stage, 0.0, "")

    def prepare(self, task: Task) -> Task:
        """Check everything that needs no cluster: the data, the backbone, and `check`. Return the
        task with its recipe and search space resolved, which takes seconds on a large backbone.
        """
        self.enter(task, "prepare")
        data_folder = self.workspace.data(task.name)
        index = prepare(task, data_folder)
        with self.here:
            inputs = open_unresolved(task, data_folder)
            remember(inputs.backbone.fingerprint, inputs.backbone.spec.weights)
            if self.elsewhere.has_workers():
                inputs = self.with_shared_backbone(inputs)
        with self.checking:
            found, of_recipe = self.elsewhere.on(inputs, resolved, self.check)
        remarks = [*remarks_on(index), *of_recipe]
        ranks, asked = self.ranks(inputs), self.placement.ranks_per_trial
        remarks += (
            [f"{ranks} of {asked} ranks train: a shard is read by one, and there are {ranks}"]
            if ranks < asked
            else []
        )
        self.on_progress(task.name, "prepare", 1.0, "; ".join(remarks))
        return task.model_copy(update={"recipe": found.recipe, "search": found.search})

    @staticmethod
    def check(inputs: Inputs) -> None:
        """Check what a run of this kind needs of the task's recipe, perhaps in a worker. Raises
        TaskpackError.
        """

    def ranks(self, inputs: Inputs) -> int:
        """How many processes train a trial or fit of a task together, each with at least one
        shard.
        """
        return min(self.placement.ranks_per_trial, len(inputs.splits["train"].shards))

    def with_shared_backbone(self, inputs: Inputs) -> Inputs:
        """The task for workers, whose backbone is a file that all processes of a node map."""
        path = self.workspace.backbone(inputs)
        if not path.exists():
            share(inputs.backbone, path)
        spec = inputs.task.backbone.model_copy(update={"weights": str(path)})
        return replace(inputs, task=inputs.task.model_copy(update={"backbone": spec}))

    def select(self, inputs: Inputs, data_folder: Path, top_k: int) -> Path:
        """The file of the task's ranked connections, created if it does not exist."""
        self.enter(inputs.task, "select")
        path = self.workspace.selection(inputs, top_k)
        if not path.exists():
            self.workers_are_up(self.ranks(inputs))
            cpus, gpus = self._per_trial()
            use_gpu = gpus > 0 and has_gpus()
            cpus = cpus if use_gpu else 1  # a CPU computes with one thread
            workers = self.placement.selection_workers or max(
                1, places(cpus, use_gpu) // max(1, self.pool.running)
            )
            if self._select_alone(inputs, data_folder, top_k, path, workers):
                return path
            check_holds_group(workers, cpus, use_gpu)
            group = functools.partial(select, workers=workers, cpus=cpus, use_gpu=use_gpu)
            interruptible(lambda: group(inputs.task, data_folder, top_k, path), self.is_stopping)
            await_file(path)
        return path

    def _select_alone(
        self, inputs: Inputs, data_folder: Path, top_k: int, path: Path, workers: int
    ) -> bool:
        """Let one process select, in place of a group of `workers`, unless the group would be done
        before or the user asked for it; whether the file was written.
        """
        given = self.placement.selection_workers
        if is_recomputable(inputs.task.selection) or not (given or self.elsewhere.has_workers()):
            alone = functools.partial(select_locally_if_faster, workers=workers)
            written = self.elsewhere.on(inputs, alone, top_k, path)
            if written:
                await_file(path)
            return bool(written)
        if given not in (None, 1):
            return False
        arguments = (inputs.task.model_dump_json(), data_folder, top_k, path, workers)
        ((_, written),) = self.on_ray(select_worker, [arguments], 1, is_stopping=self.is_stopping)
        if isinstance(written, TaskpackError):
            raise written
        if written:
            await_file(path)
        return bool(written)

    def resources(self, ranks: int) -> TrialResources:
        """The resources of a trial; starts Ray unless it runs."""
        self.workers_are_up(ranks)
        resources = TrialResources(*self._per_trial(), ranks)
        wait_for_room(ranks, resources.cpus, resources.gpus, self.is_stopping)
        return resources

    def trial_resources(self, inputs: Inputs, selection: Path | None) -> TrialResources:
        """The resources of a trial of a study: a share of a GPU, where a dry run shows that it
        suffices and the user has not said how many GPUs a trial gets; starts Ray unless it runs.
        """
        whole, name = self.resources(self.ranks(inputs)), inputs.task.name
        is_asked = self.placement.per_trial[1] is None and self.placement.ranks_per_trial == 1
        if not (whole.gpus and is_asked):
            return whole
        self.trials_per_gpu[name], why = self._trials_per_gpu(inputs, selection, whole)
        count = self.trials_per_gpu[name]
        remark = f"{count} {'trial' if count == 1 else 'trials'} per GPU: {why}"
        LOG.info("%s: %s", name, remark)
        self.on_progress(name, "search", 0.0, remark)
        return TrialResources(*self._per_trial(count))

    def _trials_per_gpu(
        self, inputs: Inputs, selection: Path | None, whole: TrialResources
    ) -> tuple[int, str]:
        """How many trials of a study share a GPU, and why so many."""
        trials = self.task_count * most_at_once(inputs.task)
        most, kinds = most_trials_per_gpu(self.placement.per_trial[0], trials), gpu_kinds()
        if most == 1:
            return 1, _NO_MORE
        if len(kinds) > 1:
            return 1, f"the cluster has several kinds of GPUs ({', '.join(kinds)})"
        try:
            need = self.gpu_shares.need(inputs, selection, whole)
        except Exception as error:  # trials can do without
            log = self.workspace.log(inputs.task.name)
            return 1, f"a dry run failed: {explained(named(error), log, 'a dry run')}"
        count = need.trials_per_gpu()
        return min(most, count), f"{need.line()}; {_NO_MORE}" if most < count else need.line()

    def trials_at_once(self, inputs: Inputs) -> int:
        """How many trials of a task can run at the same time; starts Ray unless it runs."""
        found = self.resources(self.ranks(inputs))
        return max(1, places(found.cpus, found.gpus) // found.ranks)

    def workers_are_up(self, ranks: int) -> None:
        """Start Ray and wait for nodes that can hold a trial, if the user said what it needs: an
        autoscaling cluster may have none at first.
        """
        self.ray_is_up()
        cpus, gpus = self.placement.per_trial
        wait_for_room(ranks, 1 if cpus is None else cpus, gpus or 0, self.is_stopping)

    def fits(self, arguments: Sequence[tuple[Any, ...]], ranks: int) -> Iterator[tuple[int, Any]]:
        """Run `fit_worker` on every set of arguments; yield (index, outcome) as they end. A fit
        that makes progress is retried without limit.
        """
        return self.on_ray(fit_worker, arguments, ranks, kept=lambda *given: steps_kept(given[4]))

    def on_ray(
        self,
        worker: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        ranks: int,
        kept: Callable[..., object] = lambda *given: None,
        is_stopping: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Run `worker` on every set of arguments, each with the resources of a trial of `ranks`;
        yield (index, outcome) as they end.

        Args:
            kept: as for `ended_tasks`.
            is_stopping: default: whether the run was interrupted.
        """
        if arguments:
            resources = self.resources(ranks)
            given = [(*each, resources) for each in arguments]
            limits: dict[str, Any] = {
                "ranks": ranks,
                "retries": WORKER_RETRIES,
                "kept": kept,
                "is_stopping": is_stopping or self.pool.is_stopping,
            }
            with named_deaths("a selection, trial or fit"):
                yield from ended_tasks(worker, given, resources.cpus, resources.gpus, **limits)


@contextlib.contextmanager
def named_errors(log: Path) -> Iterator[None]:
    """Convert an exception to a named error, with its traceback in `log`."""
    try:
        yield
    except Exception as error:
        fault = named(error)
        if isinstance(fault, UnexpectedError):
            raise ClusterError(
                f"unexpected {explained(fault, log, 'the task')}. {AGAIN}"
            ) from error
        if fault is error:
            raise
        raise fault from error


@on_ranks
def select_worker(
    task_json: str,
    data_folder: Path,
    top_k: int,
    path: Path,
    workers: int,
    resources: TrialResources,
    ranks: Ranks,
) -> bool:
    """`select_locally_if_faster` in a worker."""
    inputs = open_inputs(Task.model_validate_json(task_json), data_folder)
    device = resources.device()
    return select_locally_if_faster(inputs, top_k, path, workers=workers, device=device)


@on_ranks
def fit_worker(
    task_json: str,
    recipe_json: str,
    data_folder: str,
    selection: Path | None,
    folder: Path,
    resources: TrialResources,
    ranks: Ranks,
) -> FitResult:
    """`fit` in a worker."""
    with opened(task_json, recipe_json, data_folder, selection, resources.device()) as given:
        return fit(*given, folder, device=resources.device(), ranks=ranks)
