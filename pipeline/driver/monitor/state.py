"""The state of every task of a batch, as one small JSON file, which `taskpack status` shows.

The driver writes `state.json` atomically into the work folder. A job on a cluster also writes a
copy into the log folder of Ray's session, which the cluster's dashboard serves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.utils.files import read_json

BATCH_VARIABLE = "TASKPACK_BATCH"
"""The environment variable that names the batch of a job; `submit` sets it."""
STATE_FILE = "state.json"
HEARTBEAT_SECONDS = 30.0
"""Longest seconds between two writes of a running batch: an older state means that the driver is
dead.
"""
WAITING = "waiting"
"""The stage of a task that waits for its turn, before it is prepared or between two stages."""
ENDED = ("done", "failed")


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """The state of one task.

    Args:
        stage: waiting, prepare, select, search, fit, register, done or failed.
        seconds: seconds in this stage.
        trials_done: ended trials, earlier runs included, of at most `trials`; None before the
            search.
        trials_running: running trials.
        val_metric: best validation metric so far, then the champion's, and `size_bytes` the size of
            that trial's pack.
        seconds_left: estimated seconds to the end of the task; None until a trial is complete.
        images_per_second: training images per second of the trial that ended last, its validation
            included. This and the following are None where they are unknown.
        waiting: share of that trial's time in which it waited for images.
        gpu_busy: share of it in which its GPU computed.
        gpu_memory_bytes: the most of the GPU's memory that it took.
    """

    task: str
    stage: str = WAITING
    seconds: float = 0.0
    trials_done: int = 0
    trials_running: int = 0
    trials: int | None = None
    val_metric: float | None = None
    size_bytes: int | None = None
    seconds_left: float | None = None
    images_per_second: float | None = None
    waiting: float | None = None
    gpu_busy: float | None = None
    gpu_memory_bytes: int | None = None
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class BatchState:
    """The state of a batch. Times are in seconds since 1970; `seconds_left` is None until a task of
    this run has ended.
    """

    batch: str
    started: float
    written: float
    is_over: bool
    seconds_left: float | None
    tasks: tuple[TaskState, ...]

    @property
    def stages(self) -> dict[str, int]:
        """How many tasks are in each stage."""
        return dict(Counter(task.stage for task in self.tasks))

    def as_json(self) -> dict[str, Any]:
        """Convert to plain data."""
        return {**vars(self), "tasks": [dict(vars(task)) for task in self.tasks]}


def parse_state(content: Any) -> BatchState | None:
    """Read the state from parsed JSON; None if it is not one. Unknown keys are ignored."""
    try:
        tasks = tuple(TaskState(**_known(TaskState, task)) for task in content["tasks"])
        return BatchState(**{**_known(BatchState, content), "tasks": tasks})
    except (TypeError, KeyError, AttributeError):
        return None


def _known(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {key: value for key, value in content.items() if key in names}


def read_state(workdir: Path) -> BatchState | None:
    """The state of the last batch in a work folder; None if there is none."""
    return parse_state(read_json(workdir / STATE_FILE))


def state_file_name(batch: str) -> str:
    """Name of the copy in the log folder of Ray's session."""
    return f"taskpack-{batch}.json"
