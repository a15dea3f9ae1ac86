"""Where every task of a batch stands, as one small JSON file: what `taskpack status` shows, on the machine of the run or from outside a cluster.

The driver writes `state.json` into the work folder, whole or not at all. Where it is a job of a cluster, it writes a copy among the logs of Ray's
session, which the cluster's dashboard hands out.
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
"""A running batch writes its state this often at least, so its age tells whether the driver lives."""
WAITING = "waiting"
"""For its turn: before it is prepared, and from then on to its selection or search."""
ENDED = ("done", "failed")


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """One task when the state was written.

    Args:
        stage: waiting, prepare, select, search, fit, register, done or failed.
        seconds: in this stage.
        trials_done: that have ended, earlier runs included, of the `trials` that are to be run at most; None before the search.
        trials_running: now.
        val_metric: validation metric of the trial that would be champion by now, `size_bytes` its pack.
        seconds_left: to the task's end, where the trials that have ended let it be told.
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
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class BatchState:
    """A batch when its state was written. Times are in seconds since 1970; `seconds_left` is None until a task of this run has ended."""

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
        """As plain data."""
        return {**vars(self), "tasks": [dict(vars(task)) for task in self.tasks]}


def parse_state(content: Any) -> BatchState | None:
    """The state in parsed JSON; None where it is none. Keys that this version does not know are left out."""
    try:
        tasks = tuple(TaskState(**_known(TaskState, task)) for task in content["tasks"])
        return BatchState(**{**_known(BatchState, content), "tasks": tasks})
    except (TypeError, KeyError, AttributeError):
        return None


def _known(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {key: value for key, value in content.items() if key in names}


def read_state(workdir: Path) -> BatchState | None:
    """The state of the last batch that ran in a work folder; None where there is none."""
    return parse_state(read_json(workdir / STATE_FILE))


def state_file_name(batch: str) -> str:
    """Of the copy among the logs of Ray's session."""
    return f"taskpack-{batch}.json"
