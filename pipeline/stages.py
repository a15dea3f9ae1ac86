"""What a batch and a comparison have in common: a task's data, its backbone for workers, its selection, one fit in a worker, errors with names."""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.adaptation import is_recomputable
from pipeline.adaptation.packing import SizePlanner
from pipeline.backbones import share
from pipeline.backbones.known import remember
from pipeline.cluster import cluster_resources, interruptible, wait_for_node
from pipeline.data import prepare, untrained_classes
from pipeline.errors import ClusterError, StorageError, TaskpackError
from pipeline.search.study import TrialResources, check_budget
from pipeline.selection import read_selection, select, select_if_sooner
from pipeline.spec import Recipe, Task
from pipeline.training import Inputs, open_inputs
from pipeline.training.fit import FitResult, fit
from pipeline.workspace import Workspace

Stage = Literal["prepare", "select", "search", "fit", "register", "done", "failed"]
OnProgress = Callable[[str, Stage, float, str], None]
"""Called with task, stage, share of the stage done (0 to 1) and a short remark."""


def no_progress(task: str, stage: Stage, share: float, remark: str) -> None:
    """Report nothing."""


@dataclass(kw_only=True)
class Stages:
    """The stages that come before any recipe is tried, in one work folder on one Ray.

    Args:
        ray_is_up: starts Ray where it does not run yet.
        per_trial: CPUs and GPUs a trial or fit asks for; a None takes one CPU, and one GPU where the cluster has some.
    """

    workspace: Workspace
    ray_is_up: Callable[[], None]
    ray_is_private: bool
    selection_workers: int | None
    per_trial: tuple[float | None, float | None]
    on_progress: OnProgress
    stage: Stage = "prepare"

    def enter(self, task: Task, stage: Stage) -> None:
        """Say where the task stands."""
        self.stage = stage
        self.on_progress(task.name, stage, 0.0, "")

    def prepare(self, task: Task) -> None:
        """All that can be known without the cluster: the data is sound, the backbone fits, something is within budget."""
        self.enter(task, "prepare")
        data_folder = self.workspace.data(task.name)
        index = prepare(task, data_folder)
        if untrained := untrained_classes(index):
            self.on_progress(task.name, "prepare", 1.0, f"no training sample of {len(untrained)} of the classes: {', '.join(untrained)}")
        inputs = open_inputs(task, data_folder)
        remember(inputs.backbone.fingerprint, task.backbone.weights)
        check_budget(task, SizePlanner(task, inputs.backbone, inputs.index.classes).size_bytes)

    def with_shared_backbone(self, inputs: Inputs) -> Inputs:
        """The task as workers get it: all processes of a node map one file, whatever the backbone was loaded from."""
        path = self.workspace.backbone(inputs)
        if not path.exists():
            share(inputs.backbone, path)
        spec = inputs.task.backbone.model_copy(update={"weights": str(path)})
        return replace(inputs, task=inputs.task.model_copy(update={"backbone": spec}))

    def select(self, inputs: Inputs, data_folder: Path, top_k: int) -> Path:
        """The file of the task's ranked connections, made where it is not there yet."""
        self.enter(inputs.task, "select")
        path = self.workspace.selection(inputs, top_k)
        if not path.exists():
            self.workers_are_up()
            cpus, gpus = cluster_resources()
            workers = self.selection_workers or gpus or cpus
            may_be_here = self.ray_is_private and self.selection_workers is None and gpus == 0
            if (may_be_here or is_recomputable(inputs.task.selection)) and select_if_sooner(inputs, top_k, path, workers=workers):
                return path
            interruptible(lambda: select(inputs.task, data_folder, top_k, path, workers=workers, use_gpu=gpus > 0))
        return path

    def resources(self) -> TrialResources:
        """What a trial is given; starts Ray where it does not run yet."""
        self.workers_are_up()
        cpus, gpus = self.per_trial
        resources = TrialResources(cpus=1 if cpus is None else cpus, gpus=min(1, cluster_resources()[1]) if gpus is None else gpus)
        wait_for_node(resources.cpus, resources.gpus)
        return resources

    def workers_are_up(self) -> None:
        """Ray runs, and has a node for a trial as far as the user said what one needs: a cluster that scales itself may have none at first."""
        self.ray_is_up()
        cpus, gpus = self.per_trial
        wait_for_node(1 if cpus is None else cpus, gpus or 0)


@contextlib.contextmanager
def named_errors(log: Path) -> Iterator[None]:
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


def fit_worker(task_json: str, recipe_json: str, data_folder: str, selection: Path | None, folder: Path, threads: int) -> FitResult | TaskpackError:
    """`fit` in a worker; a named error is returned, so that Ray does not try again."""
    import torch

    torch.set_num_threads(threads)
    try:
        inputs = open_inputs(Task.model_validate_json(task_json), Path(data_folder))
        recipe = Recipe.model_validate_json(recipe_json)
        selected = read_selection(selection) if selection is not None else None
        return fit(inputs, recipe, selected, folder, device="cuda" if torch.cuda.is_available() else "cpu")
    except TaskpackError as error:
        return error
