"""Pass on what the driver of a batch reports to the event log, the state file, Ray's metrics and a
callback.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from pipeline.driver.monitor.events import EventLog
from pipeline.driver.monitor.metrics import RayMetrics, ray_metrics
from pipeline.driver.monitor.state import (
    BATCH_VARIABLE,
    ENDED,
    HEARTBEAT_SECONDS,
    STATE_FILE,
    WAITING,
    BatchState,
)
from pipeline.driver.monitor.tracked import TrackedTask, remaining_seconds
from pipeline.driver.stages import LOG, OnProgress, Stage
from pipeline.errors import StorageError
from pipeline.registry.pack_record import RegisteredPack
from pipeline.search.study import Study
from pipeline.search.trial_record import TrialRecord
from pipeline.utils.files import write_json
from pipeline.utils.redaction import without_secrets

WRITE_SECONDS = 1.0
"""Shortest seconds between two writes of the state."""


def batch_name() -> str:
    """The name of this batch from the environment, or one made of the time."""
    given = re.sub(r"[^A-Za-z0-9._-]", "_", os.environ.get(BATCH_VARIABLE, ""))
    return given or time.strftime("run-%Y%m%dT%H%M%S")


class BatchWatch:
    """A context manager whose `progress` is a batch's `on_progress`. Thread-safe.

    Args:
        root: the work folder.
        copies: further files to write the state to.
        on_progress: called with every progress as well.
    """

    def __init__(
        self,
        root: Path,
        batch: str,
        tasks: Sequence[str],
        *,
        copies: Sequence[Path] = (),
        on_progress: OnProgress,
    ) -> None:
        self.batch = batch
        self._files = (root / STATE_FILE, *copies)
        self._log = EventLog(root / "logs" / "batch.jsonl", batch=batch)
        self._tasks = {name: TrackedTask(name) for name in tasks}
        self._on_progress = on_progress
        self._metrics: RayMetrics | None = None
        self._lock = threading.RLock()
        self._logged: dict[str, int] = {}
        self._searched: set[str] = set()
        self._started = time.time()
        self._first_search: float | None = None
        self._writer = _Repeated(self._write, WRITE_SECONDS, HEARTBEAT_SECONDS)

    # --- what the driver reports -----------------------------------------------------------------

    def progress(self, task: str, stage: Stage, share: float, remark: str) -> None:
        """As `OnProgress`."""
        with self._lock:
            self._enter(
                self._tasks[task], WAITING if stage == "prepare" and share == 1 else stage, remark
            )
            self._on_progress(task, stage, share, remark)
        self._writer.wake()

    def _enter(self, tracked: TrackedTask, stage: str, remark: str) -> None:
        now = time.time()
        if stage != tracked.stage:
            seconds = round(now - tracked.entered, 1) if tracked.entered else None
            self._log.write(
                "stage",
                task=tracked.name,
                stage=stage,
                after=tracked.stage,
                after_seconds=seconds,
                remark=remark or None,
            )
        tracked.enter(stage, now, without_secrets(remark))
        if stage == "search" and self._first_search is None:
            self._first_search = now
        if (metrics := self._ray()) is not None:
            metrics.enter(tracked.name, stage)

    def study(self, study: Study, samples: int, fit_samples: int) -> None:
        """Report that a trial of a study has started or made progress. A trial trains on `samples`
        samples, a fit on `fit_samples`.
        """
        task = study.task.name
        with self._lock:
            tracked = self._tasks[task]
            tracked.samples, tracked.fit_ratio = samples, fit_samples / samples
            tracked.follow(study)
            new = study.ended[self._logged.get(task, 0) :]
            self._logged[task] = len(study.ended)
            before = len(study.records) - len(new)
            for count, number in enumerate(new, start=before + 1):
                self._searched.add(task)
                LOG.info(
                    "%s: trial %d of %d: %s",
                    task,
                    count,
                    study.trials_planned(),
                    without_secrets(study.records[number].line()),
                )
                self._trial_ended(task, study.records[number], samples)
            if (metrics := self._ray()) is not None:
                metrics.set(task, trials_running=tracked.trials_running)
        self._writer.wake()

    def _trial_ended(self, task: str, record: TrialRecord, samples: int) -> None:
        images_per_second = record.images_per_second(samples)
        self._log.write(
            "trial",
            task=task,
            stage="search",
            trial=record.id,
            state=record.state,
            point=record.point,
            size_bytes=record.size_bytes,
            val_metric=record.val_metric,
            epochs=len(record.curve),
            seconds=record.seconds,
            images_per_second=images_per_second,
            waiting=record.waiting,
            gpu_busy=record.gpu_busy,
            gpu_memory_bytes=record.gpu_memory_bytes,
            remark=record.message or None,
        )
        if (metrics := self._ray()) is not None:
            metrics.count_trial(task, record.state, record.seconds)
            metrics.set(
                task,
                images_per_second=images_per_second,
                waiting=record.waiting,
                gpu_busy=record.gpu_busy,
                gpu_memory_bytes=record.gpu_memory_bytes,
            )
            self._show_best(task, metrics)

    def searched(
        self,
        task: str,
        records: Sequence[TrialRecord],
        champion: TrialRecord,
        trials_left: int = 0,
    ) -> None:
        """Report that a study has ended; all its trials may be from earlier runs. The time limit
        left out `trials_left`.
        """
        with self._lock:
            self._tasks[task].take(records, champion)
            ran = self._tasks[task].trials_done
            if (metrics := self._ray()) is not None:
                self._show_best(task, metrics)
        if trials_left:
            planned = ran + trials_left
            LOG.info(
                "%s: the time limit ended the search after %d of %d trials", task, ran, planned
            )
            self._log.write("time limit", task=task, stage="search", ran=ran, planned=planned)
        self._writer.wake()

    def registered(self, task: str, trial: str, pack: RegisteredPack) -> None:
        """Report that a pack was registered."""
        numbers = {
            "size_bytes": pack.size_bytes,
            "test_metric": pack.metrics.get("test_metric"),
            "val_metric": pack.metrics.get("val_metric"),
        }
        self._log.write(
            "registered",
            task=task,
            stage="register",
            trial=trial,
            pack=f"{pack.name}/{pack.version}",
            **numbers,
        )

    def _show_best(self, task: str, metrics: RayMetrics) -> None:
        if (best := self._tasks[task].best) is not None:
            metrics.set(task, champion_bytes=best.size_bytes, champion_val_metric=best.val_metric)

    def _ray(self) -> RayMetrics | None:
        """The metrics, or None until Ray runs."""
        if self._metrics is None and (made := ray_metrics(self.batch)) is not None:
            self._metrics = made
            for tracked in self._tasks.values():
                made.enter(tracked.name, tracked.stage)
        return self._metrics

    # --- the state -------------------------------------------------------------------------------

    def state(self, *, is_over: bool = False) -> BatchState:
        """The state of every task."""
        with self._lock:
            now = time.time()
            tasks = tuple(tracked.state(now) for tracked in self._tasks.values())
            left = sum(task.stage not in ENDED for task in tasks)
            worked = sum(task.stage in ENDED and task.task in self._searched for task in tasks)
            elapsed = now - self._first_search if self._first_search is not None else 0.0
            seconds = remaining_seconds(worked, left, elapsed) if left else 0.0
        return BatchState(
            batch=self.batch,
            started=self._started,
            written=now,
            is_over=is_over,
            seconds_left=None if seconds is None else round(seconds, 1),
            tasks=tasks,
        )

    def _write(self, *, is_over: bool = False) -> None:
        content = self.state(is_over=is_over).as_json()
        for path in self._files:
            with contextlib.suppress(
                StorageError
            ):  # a state that cannot be written must not end a batch
                write_json(path, content, indent=None)

    def __enter__(self) -> BatchWatch:
        self._log.write("started", tasks=len(self._tasks))
        self._writer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.stop()
        self._write(is_over=True)
        stages = self.state().stages
        counts = {
            "tasks": len(self._tasks),
            "done": stages.get("done", 0),
            "failed": stages.get("failed", 0),
        }
        self._log.write("ended", **counts, remark=kind.__name__ if kind is not None else None)
        self._log.close()


class _Repeated:
    """Call `action` in a thread: soon after it is woken, at most every `shortest` and at least
    every `longest` seconds.
    """

    def __init__(self, action: Callable[[], None], shortest: float, longest: float) -> None:
        self._action, self._shortest, self._longest = action, shortest, longest
        self._awake, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="taskpack-state", daemon=True)

    def _run(self) -> None:
        while not self._over.is_set():
            self._awake.clear()
            self._action()
            if not self._over.wait(self._shortest):
                self._awake.wait(self._longest - self._shortest)

    def start(self) -> None:
        """Start the thread; it calls `action` at once."""
        self._thread.start()

    def wake(self) -> None:
        """Request a call soon."""
        self._awake.set()

    def stop(self) -> None:
        """Wait for a running call, if any, and stop."""
        self._over.set()
        self._awake.set()
        self._thread.join()
