"""Numbers of a running batch as Ray metrics, which every node exports to Prometheus with the prefix
`ray_`.

They are set once per stage and once per trial. Before Ray runs, nothing is set.
"""

from __future__ import annotations

import sys

STAGES = ("failed", "waiting", "prepare", "select", "search", "fit", "register", "done")
"""`taskpack_stage` is the index of a stage in this tuple, minus 1."""
GAUGES = {
    "stage": (
        "stage of the task: "
        + ", ".join(f"{number} {stage}" for number, stage in enumerate(STAGES, start=-1))
    ),
    "trials_running": "trials of the task that run now",
    "images_per_second": (
        "training images a second of the task's last trial, its validation included"
    ),
    "waiting": "share of the time in which the task's last trial waited for images",
    "gpu_busy": "share of the time in which the GPU of the task's last trial computed",
    "gpu_memory_bytes": "the most of the GPU's memory that the task's last trial took",
    "champion_bytes": "size of the pack of the task's best trial so far",
    "champion_val_metric": "validation metric of the task's best trial so far",
}
_SECONDS = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000]


class RayMetrics:
    """The metrics of one batch, with the tags `batch` and, except for the histogram, `task`.
    Created by `ray_metrics` once Ray runs.
    """

    def __init__(self, batch: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        tags = ("batch", "task")
        self._gauges = {
            name: Gauge(f"taskpack_{name}", text, tags).set_default_tags({"batch": batch})
            for name, text in GAUGES.items()
        }
        self._trials = Counter(
            "taskpack_trials", "trials that have ended", (*tags, "state")
        ).set_default_tags({"batch": batch})
        self._seconds = Histogram(
            "taskpack_trial_seconds", "how long trials took", _SECONDS, ("batch",)
        ).set_default_tags({"batch": batch})

    def set(self, task: str, **values: float | None) -> None:
        """Set gauges of a task by name; None leaves a gauge unchanged."""
        for name, value in values.items():
            if value is not None:
                self._gauges[name].set(float(value), {"task": task})

    def enter(self, task: str, stage: str) -> None:
        """Set the stage of a task."""
        self.set(task, stage=STAGES.index(stage) - 1)

    def count_trial(self, task: str, state: str, seconds: float) -> None:
        """Count a trial that has ended."""
        self._trials.inc(1, {"task": task, "state": state})
        self._seconds.observe(seconds)


def ray_metrics(batch: str) -> RayMetrics | None:
    """The metrics of a batch; None if Ray does not run in this process."""
    is_initialized = getattr(
        sys.modules.get("ray"), "is_initialized", None
    )  # another thread may be importing it
    return RayMetrics(batch) if is_initialized is not None and is_initialized() else None
