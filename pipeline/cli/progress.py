"""Progress of a running command: on a terminal, a line per task that changes in place; otherwise,
such as in a log file, plain lines.

Plain lines are written as soon as something has ended, whole, and without control codes: one per
stage, trial and fit.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from pipeline.cli.console import interruption_says, out
from pipeline.driver.stages import LOG, Stage

_PLAN_LINE_SECONDS = 15


class BatchProgress(logging.Handler):
    """A context manager whose `update` is a batch's `on_progress`. Without a terminal, it prints
    the log as well.
    """

    def __init__(self, console: Console, tasks: list[str]) -> None:
        super().__init__()
        self._console, self._started, self._stages = (
            console,
            time.monotonic(),
            dict.fromkeys(tasks, ""),
        )
        self._live: Progress | None = None
        if console.file.isatty():  # `is_terminal` believes FORCE_COLOR, which CI systems set
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                TextColumn("{task.fields[stage]:8}"),
                BarColumn(24),
            )
            self._live = Progress(
                *columns,
                TimeElapsedColumn(),
                TextColumn("{task.fields[remark]}", markup=False),
                console=console,
            )
            width = max(map(len, tasks), default=0)
            self._lines: dict[str, TaskID] = {
                name: self._live.add_task(
                    name.ljust(width), start=False, total=1.0, stage="waiting", remark=""
                )
                for name in tasks
            }

    def update(self, task: str, stage: Stage, share: float, remark: str) -> None:
        """Show the progress of a task."""
        if self._live is not None:
            self._show(task, stage, share, remark)
        elif self._stages[task] != stage or (
            stage in ("prepare", "register") and remark
        ):  # their remarks are for the user
            self._print(f"{task}: {stage}{' - ' + remark if remark else ''}")
        self._stages[task] = stage

    def emit(self, record: logging.LogRecord) -> None:
        """Show a line of the log."""
        self._print(record.getMessage())

    def _print(self, text: str) -> None:
        line = f"[{time.monotonic() - self._started:6.1f} s] {text}"
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _show(self, task: str, stage: Stage, share: float, remark: str) -> None:
        assert self._live is not None
        line = self._lines[task]
        if not self._stages[task]:
            self._live.start_task(line)
        if (
            stage == "prepare" and remark
        ):  # it is longer than the line, and the next stage would overwrite it
            self._live.console.print(
                f"{task}: {remark}", markup=False, highlight=False, emoji=False, soft_wrap=True
            )
        self._live.update(
            line, completed=share, stage=stage, remark=remark.splitlines()[0][:60] if remark else ""
        )
        if stage in ("done", "failed"):
            self._live.stop_task(line)

    def __enter__(self) -> BatchProgress:
        if self._live is not None:
            self._live.start()
        else:
            LOG.addHandler(self)
            LOG.setLevel(logging.INFO)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        LOG.removeHandler(self)


@contextlib.contextmanager
def batch_progress(
    tasks: Sequence[str], workdir: Path, *, as_json: bool
) -> Iterator[BatchProgress]:
    """Show the progress of a batch in `workdir`, on standard error if the result is JSON; an
    interruption says that the same command continues.
    """
    console = Console(stderr=True) if as_json else out
    kept = f"finished work is kept in {workdir}; run the same command to continue"
    with interruption_says(kept), BatchProgress(console, list(tasks)) as progress:
        yield progress


class PlanProgress:
    """A context manager whose `step` a plan reports to. Without a terminal, it prints counts every
    15 seconds.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._step, self._began, self._shown = console, "", 0.0, 0.0
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            TextColumn("{task.fields[left]}", markup=False),
        )
        self._live = (
            Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
            if console.file.isatty()
            else None
        )
        self._line: TaskID | None = None

    def step(self, name: str, done: int, total: int) -> None:
        """Show the current step, its progress, and the estimated time remaining."""
        now = time.monotonic()
        is_new = name != self._step
        if is_new or done == 0:
            self._step, self._began = name, now
        seconds_left = (now - self._began) * (total - done) / done if done else None
        left = "" if seconds_left is None else f"about {seconds_left:.0f} s left"
        if self._live is not None:
            self._show(name, done, total, left, is_new)
        elif total and (done < 2 or now - self._shown >= _PLAN_LINE_SECONDS):
            self._shown = now
            counted = f"{done} of {total} batches, {left}" if done else f"{total} batches"
            self._console.print(
                f"{name}: {counted}", markup=False, highlight=False, emoji=False, soft_wrap=True
            )

    def _show(self, name: str, done: int, total: int, left: str, is_new: bool) -> None:
        assert self._live is not None
        if is_new and self._line is not None:
            self._live.remove_task(self._line)
        if is_new:
            self._line = self._live.add_task(name, total=None, left="")
        assert self._line is not None
        self._live.update(self._line, completed=done, total=total or None, left=left)

    def __enter__(self) -> PlanProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
