"""A batch: every task through prepare, select, search, fit and register, on one Ray.

All tasks are prepared first, so that a fault in the last one's data shows before the first one's search. One task's failure never stops the others.
Every stage leaves its result on disk before the next begins, so the same command after an interruption redoes nothing that was finished.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipeline.adaptation.packing import SizePlanner
from pipeline.backbones import share
from pipeline.backbones.known import remember
from pipeline.cluster import check_fits_a_node, cluster_resources, interruptible, ray_session
from pipeline.data import prepare, untrained_classes
from pipeline.errors import ClusterError, StorageError, TaskpackError
from pipeline.registry.record import Champion, RegisteredPack
from pipeline.registry.store import open_registry
from pipeline.reports.front import draw_front
from pipeline.search.champion import choose_champion
from pipeline.search.record import TrialRecord
from pipeline.search.study import Study, TrialResources, check_budget, run_study
from pipeline.selection import read_selection, select, select_if_sooner
from pipeline.spec import Recipe, Task
from pipeline.storage import exclusive
from pipeline.training import Inputs, open_inputs
from pipeline.training.fit import PACK_FILE, FitResult, fit, read_fit
from pipeline.workspace import StudyFolder, Workspace

if TYPE_CHECKING:
    from pipeline.registry.store import Registry

Stage = Literal["prepare", "select", "search", "fit", "register", "done", "failed"]
OnProgress = Callable[[str, Stage, float, str], None]
"""Called with task, stage, share of the stage done (0 to 1) and a short remark."""


def no_progress(task: str, stage: Stage, share: float, remark: str) -> None:
    """Report nothing."""


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """What became of one task: a registered pack, or an error and the stage it came from."""

    task: str
    registered: RegisteredPack | None = None
    trials: tuple[TrialRecord, ...] = ()
    champion_id: str | None = None
    front_figure: Path | None = None
    stage: Stage = "done"
    error: TaskpackError | None = None


def run_batch(
    tasks: Sequence[Task],
    workdir: Path,
    *,
    address: str | None = None,
    registry_uri: str | None = None,
    selection_workers: int | None = None,
    per_trial: tuple[float | None, float | None] = (None, None),
    on_progress: OnProgress = no_progress,
) -> list[TaskOutcome]:
    """Run every task to a registered pack.

    Args:
        workdir: keeps all intermediate results; on a cluster it must be a folder that every node sees.
        address: of a Ray cluster; None starts a private one here, and only when a stage needs it.
        registry_uri: MLflow tracking server; None takes MLFLOW_TRACKING_URI, else a SQLite file in `workdir`.
        per_trial: CPUs and GPUs of a trial and of the final fit; a None takes one CPU, and one GPU where the cluster has some.
        selection_workers: ranks of the selection's worker group; None takes the cluster's CPUs, or its GPUs where it has some, but no group where
            this process is done before one has started.

    Raises:
        StorageError: the work folder cannot be used.
        RegistryError: the registry cannot be reached.
        ClusterError: no cluster answers at `address`.
    """
    workspace = Workspace(workdir.resolve())
    with exclusive(workspace.root), contextlib.ExitStack() as stack:
        workspace.clear_leftovers()
        registry = open_registry(registry_uri, workspace.root)
        ray_is_up = functools.cache(lambda: stack.enter_context(ray_session(address)))
        if address is not None:
            ray_is_up()
        driver = _Driver(workspace, registry, ray_is_up, address is None, selection_workers, per_trial, on_progress)
        return driver.run(tasks)


_Outcome = TypeVar("_Outcome")


@dataclass
class _Driver:
    workspace: Workspace
    registry: Registry
    ray_is_up: Callable[[], None]
    ray_is_private: bool
    selection_workers: int | None
    per_trial: tuple[float | None, float | None]
    on_progress: OnProgress
    stage: Stage = "prepare"

    def run(self, tasks: Sequence[Task]) -> list[TaskOutcome]:
        """All tasks to outcomes; an error is part of its task's. Every task is prepared before the first is run, so faults show early."""
        failed = {task.name: outcome for task in tasks if (outcome := self._outcome(task, self._prepare)) is not None}
        return [failed.get(task.name) or self._run_prepared(task) for task in tasks]

    def _outcome(self, task: Task, stages: Callable[[Task], _Outcome]) -> _Outcome | TaskOutcome:
        """What `stages` return, or the failure they end in."""
        try:
            with _named_errors(self.workspace.root / "logs" / f"{task.name}.txt"):
                return stages(task)
        except TaskpackError as error:
            self.on_progress(task.name, "failed", 1.0, str(error))
            return TaskOutcome(task=task.name, stage=self.stage, error=error)

    def _run_prepared(self, task: Task) -> TaskOutcome:
        outcome = self._outcome(task, self._stages)
        if outcome.error is None:
            self.on_progress(task.name, "done", 1.0, "")
        return outcome

    def _enter(self, task: Task, stage: Stage) -> None:
        self.stage = stage
        self.on_progress(task.name, stage, 0.0, "")

    def _prepare(self, task: Task) -> None:
        """All that can be known without the cluster: the data is sound, the backbone fits, something is within budget."""
        self._enter(task, "prepare")
        data_folder = self.workspace.data(task.name)
        index = prepare(task, data_folder)
        if untrained := untrained_classes(index):
            self.on_progress(task.name, "prepare", 1.0, f"no training sample of {len(untrained)} of the classes: {', '.join(untrained)}")
        inputs = open_inputs(task, data_folder)
        remember(inputs.backbone.fingerprint, task.backbone.weights)
        check_budget(task, SizePlanner(task, inputs.backbone, inputs.index.classes).size_bytes)

    def _stages(self, task: Task) -> TaskOutcome:
        data_folder = self.workspace.data(task.name)
        inputs = self._with_shared_backbone(open_inputs(task, data_folder))
        task = inputs.task
        top_k = task.search.max_top_k(task.recipe)
        folder = self.workspace.study(inputs, top_k)
        selection = self._select(inputs, data_folder, top_k) if top_k else None
        trials = self._search(inputs, data_folder, selection, folder)
        champion = choose_champion(trials, task.budget)
        draw_front(
            [trial.row() for trial in trials],
            folder.figure,
            title=f"{task.name}: validation accuracy against the pack's size",
            max_bytes=task.budget.max_bytes,
            champion=champion.id,
        )
        fitted = self._fit(inputs, data_folder, champion, selection, folder)
        self._enter(task, "register")
        registered = self.registry.register(_describe(inputs, champion, trials, fitted, folder))
        return TaskOutcome(task=task.name, registered=registered, trials=tuple(trials), champion_id=champion.id, front_figure=folder.figure)

    def _with_shared_backbone(self, inputs: Inputs) -> Inputs:
        """The task as workers get it: all processes of a node map one file, whatever the backbone was loaded from."""
        path = self.workspace.backbone(inputs)
        if not path.exists():
            share(inputs.backbone, path)
        spec = inputs.task.backbone.model_copy(update={"weights": str(path)})
        return replace(inputs, task=inputs.task.model_copy(update={"backbone": spec}))

    def _select(self, inputs: Inputs, data_folder: Path, top_k: int) -> Path:
        self._enter(inputs.task, "select")
        path = self.workspace.selection(inputs, top_k)
        if not path.exists():
            self.ray_is_up()
            cpus, gpus = cluster_resources()
            workers = self.selection_workers or gpus or cpus
            may_be_here = self.ray_is_private and self.selection_workers is None and gpus == 0
            if may_be_here and select_if_sooner(inputs, top_k, path, workers=workers):
                return path
            interruptible(lambda: select(inputs.task, data_folder, top_k, path, workers=workers, use_gpu=gpus > 0))
        return path

    def _search(self, inputs: Inputs, data_folder: Path, selection: Path | None, folder: StudyFolder) -> list[TrialRecord]:
        task = inputs.task
        self._enter(task, "search")
        planner = SizePlanner(task, inputs.backbone, inputs.index.classes, read_selection(selection) if selection is not None else None)

        def report(study: Study) -> None:
            total = min(task.search.trials, task.search.size())
            self.on_progress(task.name, "search", min(1.0, study.epochs_done() / total), study.remark())

        return run_study(
            task,
            data_folder,
            selection,
            folder.journal,
            size_of=planner.size_bytes,
            val_samples=len(inputs.splits["val"]),
            resources=self._resources,
            on_progress=report,
        )

    def _fit(self, inputs: Inputs, data_folder: Path, champion: TrialRecord, selection: Path | None, folder: StudyFolder) -> FitResult:
        task = inputs.task
        self._enter(task, "fit")
        done = read_fit(folder.fit(champion.id))
        if done is not None:
            return done
        recipe = task.search.recipe(task.recipe, champion.point)
        return _fit_on_ray(task, recipe, data_folder, selection, folder.fit(champion.id), self._resources())

    def _resources(self) -> TrialResources:
        """What a trial is given; starts Ray where it does not run yet."""
        self.ray_is_up()
        cpus, gpus = self.per_trial
        resources = TrialResources(cpus=1 if cpus is None else cpus, gpus=min(1, cluster_resources()[1]) if gpus is None else gpus)
        check_fits_a_node(resources.cpus, resources.gpus)
        return resources


@contextlib.contextmanager
def _named_errors(log: Path) -> Iterator[None]:
    """Turn what is not named yet into a named error whose details are in `log`."""
    try:
        yield
    except TaskpackError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise StorageError(f"{error.filename or 'the work folder'}: {error.strerror}; free space, or choose another --workdir") from None
        raise _unexpected(error, log) from error
    except Exception as error:
        raise _unexpected(error, log) from error


def _unexpected(error: Exception, log: Path) -> ClusterError:
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc())
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return ClusterError(f"unexpected {type(error).__name__}: {first}; details in {log}. The same command tries again from the last finished stage")


def _fit_on_ray(task: Task, recipe: Recipe, data_folder: Path, selection: Path | None, folder: Path, resources: TrialResources) -> FitResult:
    import ray

    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=2)(_fit_worker)
    running = remote.remote(task.model_dump_json(), recipe.model_dump_json(), str(data_folder), selection, folder, max(1, int(resources.cpus)))
    try:
        result = ray.get(running)
    except KeyboardInterrupt:  # where Ray is not ours, it outlives us
        ray.cancel(running, force=True)
        raise
    if isinstance(result, TaskpackError):
        raise result
    return result


def _fit_worker(task_json: str, recipe_json: str, data_folder: str, selection: Path | None, folder: Path, threads: int) -> FitResult | TaskpackError:
    import torch

    torch.set_num_threads(threads)
    try:
        inputs = open_inputs(Task.model_validate_json(task_json), Path(data_folder))
        recipe = Recipe.model_validate_json(recipe_json)
        selected = read_selection(selection) if selection is not None else None
        return fit(inputs, recipe, selected, folder, device="cuda" if torch.cuda.is_available() else "cpu")
    except TaskpackError as error:
        return error


def _describe(inputs: Inputs, champion: TrialRecord, trials: Sequence[TrialRecord], fitted: FitResult, folder: StudyFolder) -> Champion:
    task = inputs.task
    assert champion.val_metric is not None
    return Champion(
        task=task.name,
        pack_path=folder.fit(champion.id) / PACK_FILE,
        pack_digest=fitted.pack_digest,
        size_bytes=fitted.size_bytes,
        ledger=fitted.ledger,
        metrics={
            "test_accuracy": fitted.test_accuracy,
            "test_accuracy_stderr": fitted.test_accuracy_stderr,
            "val_accuracy": champion.val_metric,
            "trained_values": fitted.trained_values,
            "search_seconds": sum(trial.seconds for trial in trials),
            "fit_seconds": fitted.train_seconds,
        },
        params=flatten(task.search.recipe(task.recipe, champion.point).model_dump(exclude_none=True)),
        tags={
            "backbone": task.backbone.model,
            "backbone_fingerprint": inputs.backbone.fingerprint,
            "data_digest": inputs.index.digest,
            "description": task.description,
            "trial": champion.id,
            "device": fitted.device,
        },
        front=[trial.row() for trial in trials],
        front_figure=folder.figure,
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as `part.key` to text, for parameters of a run."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat
