"""From a notebook, what the commands do: run a batch, find packs by numbers, load one, predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import SpecError
from pipeline.spec import Task
from pipeline.task_files import load_tasks

if TYPE_CHECKING:
    from pipeline.batch import TaskOutcome
    from pipeline.registry.record import RegisteredPack
    from pipeline.serving.predictor import Predictor
    from pipeline.stages import OnProgress

WORKDIR = Path("runs")


def run(
    tasks: Sequence[Task | str | Path],
    *,
    workdir: str | Path = WORKDIR,
    address: str | None = None,
    overrides: dict[str, Any] | None = None,
    per_trial: tuple[float | None, float | None] = (None, None),
    selection_workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[TaskOutcome]:
    """Run tasks, given as `Task`s or as task files or folders of them, to registered packs.

    Args:
        workdir: keeps every intermediate result; run again with the same one to resume.
        address: of a Ray cluster; None starts a private one on this machine.
        overrides: sections of the task files to replace, such as `{"budget": {"max_bytes": "32KiB"}, "search": {"trials": 6}}`.
        per_trial: CPUs and GPUs a trial asks Ray for; a None takes 1 CPU, and 1 GPU where the cluster has some.
        selection_workers: that select connections; None takes one a GPU or CPU, but none where this process is done sooner.

    Raises:
        TaskpackError: nothing could be run at all. What befell single tasks is in their outcomes.
    """
    from pipeline.batch import run_batch
    from pipeline.stages import no_progress

    given = [task for task in tasks if isinstance(task, Task)]
    read = load_tasks([Path(task) for task in tasks if not isinstance(task, Task)], overrides=overrides)
    batch = [*given, *read]
    names = [task.name for task in batch]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise SpecError(f"tasks: the name {repeated[0]!r} is given twice; give each task of a batch its own name")
    if given and overrides:
        raise SpecError("overrides: they apply to task files only; change the Task objects themselves")
    return run_batch(
        batch,
        Path(workdir),
        address=address,
        selection_workers=selection_workers,
        per_trial=per_trial,
        on_progress=on_progress or no_progress,
    )


def find(
    task: str | None = None,
    *,
    max_bytes: int | None = None,
    min_metric: float | None = None,
    limit: int = 50,
    workdir: str | Path = WORKDIR,
) -> list[RegisteredPack]:
    """Registered packs by numbers, best test metric first.

    Args:
        min_metric: smallest test metric, in [0, 1].
        workdir: whose embedded registry to ask where MLFLOW_TRACKING_URI is not set.
    """
    from pipeline.registry.store import open_registry

    return open_registry(None, Path(workdir).resolve()).search(task=task, max_bytes=max_bytes, min_metric=min_metric, limit=limit)


def load(reference: str | Path, *, backbone: str | Path | None = None, workdir: str | Path = WORKDIR) -> Predictor:
    """A pack ready to predict, by file or by registry reference (`NAME`, `NAME@alias`, `NAME/version`).

    Args:
        backbone: checkpoint of the pack's backbone; default: the one this machine used before, or the embedded one.

    Raises:
        RegistryError: no such pack. PackError, BackboneError: it cannot be used here.
    """
    from pipeline.serving.predictor import load_predictor

    return load_predictor(fetch(reference, workdir=workdir), str(backbone) if backbone is not None else None)


def fetch(reference: str | Path, *, workdir: str | Path = WORKDIR) -> Path:
    """The pack file behind a reference: a local path as it is, a registered pack downloaded into `workdir`."""
    from pipeline.registry.store import open_registry

    if Path(reference).is_file():
        return Path(reference)
    root = Path(workdir).resolve()
    registry = open_registry(None, root)
    registered = registry.get(str(reference))
    return registry.download(registered, root / "downloads")
