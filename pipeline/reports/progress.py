"""What a running batch shows: one line a task on a terminal, one line a stage in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from pipeline.stages import Stage


class BatchProgress:
    """Use as a context manager; its `update` is a batch's `on_progress`."""

    def __init__(self, console: Console, tasks: list[str]) -> None:
        self._console, self._started, self._stages = console, time.monotonic(), dict.fromkeys(tasks, "")
        self._live: Progress | None = None
        if console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TextColumn("{task.fields[stage]:8}"), BarColumn(24))
            self._live = Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[remark]}", markup=False), console=console)
            width = max(map(len, tasks), default=0)
            self._lines: dict[str, TaskID] = {
                name: self._live.add_task(name.ljust(width), start=False, total=1.0, stage="waiting", remark="") for name in tasks
            }

    def update(self, task: str, stage: Stage, share: float, remark: str) -> None:
        """Show where a task stands."""
        if self._live is not None:
            self._show(task, stage, share, remark)
        elif self._stages[task] != stage or (stage in ("prepare", "register") and remark):  # what these two remark, should be read
            line = f"[{time.monotonic() - self._started:6.1f} s] {task}: {stage}{' - ' + remark if remark else ''}"
            self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._stages[task] = stage

    def _show(self, task: str, stage: Stage, share: float, remark: str) -> None:
        assert self._live is not None
        line = self._lines[task]
        if not self._stages[task]:
            self._live.start_task(line)
        if stage == "prepare" and remark:  # longer than the line, and gone with the next stage
            self._live.console.print(f"{task}: {remark}", markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._live.update(line, completed=share, stage=stage, remark=remark.splitlines()[0][:60] if remark else "")
        if stage in ("done", "failed"):
            self._live.stop_task(line)

    def __enter__(self) -> BatchProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
