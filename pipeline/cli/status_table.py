"""The progress of a batch's tasks, as a table and a sentence."""

from __future__ import annotations

from rich.table import Table

from pipeline.cli.tables import kib, table
from pipeline.driver.monitor.state import ENDED, HEARTBEAT_SECONDS, WAITING, BatchState, TaskState
from pipeline.utils.durations import duration

SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS


def state_table(state: BatchState, *, is_running: bool) -> Table:
    """One row per task: stage, and validation metric and size of the best trial so far.

    The time remaining is blank until it can be estimated. Where trials run on GPUs, two columns say
    how fast the last one was, how busy it kept its GPU, and how much memory it took there.
    """
    has_gpus = any(_gpu(task) for task in state.tasks)
    gpus = ["images/s", "GPU"] if has_gpus else []
    built = table("task", "stage", "trials", "val %", "pack", *gpus, "left", numbers_from=2)
    for task in state.tasks:
        speed = "" if task.images_per_second is None else f"{task.images_per_second:.0f}"
        built.add_row(
            task.task,
            task.stage,
            "" if task.trials is None else f"{task.trials_done}/{task.trials}",
            "" if task.val_metric is None else f"{100 * task.val_metric:.1f}",
            "" if task.size_bytes is None else kib(task.size_bytes),
            *([speed, _gpu(task)] if has_gpus else []),
            duration(task.seconds_left) if is_running else "",
        )
    return built


def _gpu(task: TaskState) -> str:
    """What a task's last trial made of its GPU: `87% 9.1 GiB`; empty without one."""
    busy = "" if task.gpu_busy is None else f"{task.gpu_busy:.0%}"
    memory = "" if task.gpu_memory_bytes is None else f"{task.gpu_memory_bytes / 2**30:.1f} GiB"
    return f"{busy} {memory}".strip()


def summary(state: BatchState, *, is_running: bool, age_seconds: float | None = None) -> str:
    """How many tasks are in which state, and the time remaining.

    Args:
        age_seconds: age of the state, if it was written on this machine; tells whether its driver
            is alive.
    """
    stages = state.stages
    at_work = sum(count for stage, count in stages.items() if stage not in (WAITING, *ENDED))
    counts = {
        "done": stages.get("done", 0),
        "failed": stages.get("failed", 0),
        "at work": at_work,
        "waiting": stages.get(WAITING, 0),
    }
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    text = (
        f"{state.batch}: {len(state.tasks)} {'task' if len(state.tasks) == 1 else 'tasks'}, {said}"
    )
    if not is_running:
        return (
            f"{text}; the run is over"
            if at_work + counts["waiting"] == 0
            else f"{text}; the run ended early; run the same command to continue"
        )
    if age_seconds is not None and age_seconds > SILENCE_SECONDS:
        return (
            f"{text}; last update {duration(age_seconds)} ago: the run was killed, or its machine"
            " stopped; run the same command to continue"
        )
    return f"{text}; about {left} left" if (left := duration(state.seconds_left)) else text
