"""How many trials of a study share a GPU where the user has not said: by a dry run, once per kind
of study and of GPU, which is kept in the work folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.cluster.capacity import gpu_kinds
from pipeline.cluster.rank_group import WORKER_DIED, WORKER_RETRIES, TrialResources, on_ranks
from pipeline.cluster.tasks import WorkersDied, ended_tasks
from pipeline.errors import ClusterError, StorageError, TaskpackError
from pipeline.search.trial import opened
from pipeline.specs import Task
from pipeline.training import Inputs, Ranks
from pipeline.training.dry_run import GpuNeed, dry_run
from pipeline.utils.files import read_json, write_json

_VERSION = 1


class GpuShares:
    """What trials take of a GPU, each kind found once. Thread-safe.

    Args:
        folder: keeps what was found.
    """

    def __init__(self, folder: Path, is_stopping: Callable[[], bool]) -> None:
        self._folder, self._is_stopping = folder, is_stopping
        self._locks: dict[str, threading.Lock] = {}

    def need(self, inputs: Inputs, selection: Path | None, whole: TrialResources) -> GpuNeed:
        """What a trial of a task takes of a GPU: what was kept, or that of a dry run on `whole`,
        the resources of a trial with a GPU of its own.

        Raises:
            TaskpackError: The dry run failed.
            Interrupted: `is_stopping()` became true.
        """
        key = need_key(inputs, gpu_kinds())
        path = self._folder / f"{key}.json"
        with self._locks.setdefault(key, threading.Lock()):
            found = _read(path)
            if found is None:
                found = self._measured(inputs, selection, whole)
                with contextlib.suppress(StorageError):  # the study's own records will not fit
                    write_json(path, asdict(found))
        return found

    def _measured(self, inputs: Inputs, selection: Path | None, whole: TrialResources) -> GpuNeed:
        ended = ended_tasks(
            _worker,
            [(inputs.task.model_dump_json(), str(inputs.data_folder), selection, whole)],
            whole.cpus,
            whole.gpus,
            retries=WORKER_RETRIES,
            is_stopping=self._is_stopping,
        )
        try:
            ((_, outcome),) = ended
        except WorkersDied:
            raise ClusterError(WORKER_DIED) from None
        if isinstance(outcome, TaskpackError):
            raise outcome
        return outcome


def need_key(inputs: Inputs, gpus: Sequence[str]) -> str:
    """SHA-256 hex over what a trial's memory and time depend on: backbone, size of the samples,
    recipes and kinds of GPUs. Of classes it counts those of a dense kind, which has an output per
    class and pixel.
    """
    task = inputs.task
    settings = {"training": {"learning_rate", "epochs", "warmup_epochs"}}
    recipes = task.search.fullest(task.recipe)
    content = [
        _VERSION,
        inputs.backbone.fingerprint,
        task.backbone.model,
        inputs.backbone.takes.identity,
        task.kind,
        len(inputs.index.classes) if inputs.kind.is_dense else 0,
        [recipe.model_dump(mode="json", exclude=settings) for recipe in recipes],
        list(gpus),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _read(path: Path) -> GpuNeed | None:
    try:
        return GpuNeed(**read_json(path))
    except TypeError:  # none yet, or one that an older version wrote
        return None


@on_ranks
def _worker(
    task_json: str,
    data_folder: str,
    selection: Path | None,
    resources: TrialResources,
    ranks: Ranks,
) -> GpuNeed:
    """A dry run in a worker."""
    recipe_json = Task.model_validate_json(task_json).recipe.model_dump_json()
    device = resources.device()
    with opened(task_json, recipe_json, data_folder, selection, device) as (inputs, _, selected):
        return dry_run(inputs, selected, device)
