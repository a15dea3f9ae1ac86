"""What takes the driver more than a moment is computed by workers of its cluster: it follows many
studies at once, and all its threads share one core.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.capacity import has_gpus
from pipeline.cluster.rank_group import WORKER_DIED, WORKER_RETRIES
from pipeline.cluster.session import is_connected
from pipeline.cluster.tasks import WorkersDied, computed
from pipeline.errors import ClusterError
from pipeline.inputs.task_inputs import open_unresolved
from pipeline.specs import Task
from pipeline.training import Inputs

AGAIN = "The same command tries again from the last finished stage"


@dataclass(frozen=True)
class Elsewhere:
    """Computes in a worker if there are any, otherwise here. An error is raised, named.

    Args:
        here: lock of computations in this process.
    """

    ray_is_private: bool
    is_stopping: Callable[[], bool]
    here: threading.Lock

    def has_workers(self) -> bool:
        """Whether workers compute: not on a private Ray without GPUs, whose CPUs are those of this
        process, nor before Ray is up.
        """
        return is_connected() and (not self.ray_is_private or has_gpus())

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function gives."""
        compute = self._by_worker if self.has_workers() else self._by_us
        return compute(function, *arguments)

    def on(self, inputs: Inputs, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a task's inputs gives; a worker opens the task anew, so it must see
        the backbone's weights.
        """
        if not self.has_workers():
            return self._by_us(function, inputs, *arguments)
        return self._by_worker(_on_opened, function, inputs.task, inputs.data_folder, *arguments)

    def _by_us(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self.here:
            return function(*arguments)

    def _by_worker(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with named_deaths("a computation of seconds"):
            return computed(function, arguments, self.is_stopping, retries=WORKER_RETRIES)


def _on_opened(function: Callable[..., Any], task: Task, data_folder: Path, *arguments: Any) -> Any:
    return function(open_unresolved(task, data_folder), *arguments)


@contextlib.contextmanager
def named_deaths(what: str) -> Iterator[None]:
    """Convert the deaths of workers to a named error."""
    try:
        yield
    except WorkersDied:
        raise ClusterError(
            f"{what} did not end: {WORKER_DIED}; see whether its memory suffices. {AGAIN}"
        ) from None
