"""The record of a trial, and the folder of a study's records, which later runs reuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import OutOfMemory, TaskpackError, TrainingError
from pipeline.kinds import Outcomes
from pipeline.search.kept_outcomes import read_outcomes
from pipeline.utils.files import explained, read_json, write_json

TrialState = Literal["complete", "stopped", "rejected", "failed"]
USAGE_FIELDS = ("waiting", "gpu_busy", "gpu_memory_bytes")
"""What a trial reports of its usage, by the names in its record."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial.

    `id` is the key of its recipe; `curve` the validation metric after each epoch, and `errors`
    their standard errors; `val_metric` the last value of a complete trial's curve. A rejected trial
    is over budget and never ran. `waiting`, `gpu_busy` and `gpu_memory_bytes` are those of `Usage`
    (training/usage.py), of the trial's first rank. `message` is the reason of a failure or
    rejection, or a warning about a complete trial. `error` is the name of the error of a failure;
    `ended` the time of the end, in seconds since 1970, 0 if unknown.
    """

    id: str
    point: dict[str, Any]
    size_bytes: int
    state: TrialState
    val_metric: float | None = None
    curve: tuple[float, ...] = field(default=())
    errors: tuple[float, ...] = field(default=())
    seconds: float = 0.0
    ended: float = 0.0
    waiting: float | None = None
    gpu_busy: float | None = None
    gpu_memory_bytes: int | None = None
    message: str = ""
    error: str = ""

    @property
    def is_final(self) -> bool:
        """Whether a retry would end the same way: true of failures of a recipe on its device, false
        of failures of a worker or of code.
        """
        return self.error in ("", TrainingError.__name__, OutOfMemory.__name__)

    def images_per_second(self, samples: int) -> float | None:
        """Training images per second of a trial that trains on `samples` per epoch, its validation
        included; None for one that ended before its first epoch.
        """
        if not (self.seconds and self.curve):
            return None
        return round(samples * len(self.curve) / self.seconds, 1)

    def row(self) -> dict[str, Any]:
        """Convert to plain data, for tables, figures and the registry."""
        return {
            **asdict(self),
            "curve": list(self.curve),
            "errors": list(self.errors),
            "epochs": len(self.curve),
        }

    def line(self) -> str:
        """One line for a log: `complete, validation 0.8125, 3046 bytes, 12.3 s`."""
        metric = self.curve[-1] if self.curve else self.val_metric
        validation = [] if metric is None else [f"validation {metric:.4f}"]
        reason = f" - {self.message.splitlines()[0][:300]}" if self.message else ""
        return (
            ", ".join(
                [self.state, *validation, f"{self.size_bytes} bytes", f"{self.seconds:.1f} s"]
            )
            + reason
        )


_UNSETTLED = ".ended"
"""Ending of the file of a trial that is not recorded yet."""


class TrialJournal:
    """A folder with one JSON file per trial, each written atomically, and next to it the trial's
    validation outputs.

    Tracebacks of failures go to `log`.
    """

    def __init__(self, folder: Path, log: Path | None = None) -> None:
        self.folder, self._log = folder, log or folder / "log.txt"

    def read(self) -> dict[str, TrialRecord]:
        """The finished trials, by id. A file that is not a record is ignored, so that the trial
        runs again.
        """
        records = (_read_record(path) for path in sorted(self.folder.glob("*.json")))
        return {record.id: record for record in records if record is not None}

    def outcomes_path(self, trial: str) -> Path:
        """Where the worker of a trial keeps its validation outputs."""
        return self.folder / f"{trial}.safetensors"

    def outcomes(self, trial: str) -> Outcomes | None:
        """The validation outputs of a completed trial; None if they are missing."""
        return read_outcomes(self.outcomes_path(trial))

    def write(self, record: TrialRecord) -> None:
        """Write the record of a finished trial, unless a retry may end differently. Raises
        StorageError.
        """
        if record.is_final:
            write_json(self._path(record.id), asdict(record))
        self._unsettled_path(record.id).unlink(missing_ok=True)

    def read_unsettled(self) -> dict[str, TrialRecord]:
        """What trials have ended with that were not recorded yet, by id."""
        records = (_read_record(path) for path in sorted(self.folder.glob(f"*{_UNSETTLED}")))
        return {record.id: record for record in records if record is not None}

    def write_unsettled(self, record: TrialRecord) -> None:
        """Keep what a trial has ended with until it is recorded. Raises StorageError."""
        if record.is_final:
            write_json(self._unsettled_path(record.id), asdict(record))

    def _unsettled_path(self, trial: str) -> Path:
        return self.folder / f"{trial}{_UNSETTLED}"

    def failure(self, trial: str, fault: TaskpackError) -> dict[str, Any]:
        """The message of a record for the error of a trial."""
        message = explained(fault, self._log, f"trial {trial}")
        if isinstance(fault, OutOfMemory):
            message += f". To try this trial again with more memory, remove {self._path(trial)}"
        return {"state": "failed", "error": type(fault).__name__, "message": message}

    def _path(self, trial: str) -> Path:
        return self.folder / f"{trial}.json"


def failure_warnings(records: Sequence[TrialRecord]) -> list[str]:
    """One warning per kind of failure among a study's trials: their number and the first
    message.
    """
    failed: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.state == "failed":
            failed.setdefault(record.error, []).append(record)
    warnings = []
    for alike in failed.values():
        first = (
            f"{len(alike)} of {len(records)} trials"
            f" failed{', the first' if len(alike) > 1 else ''}: {alike[0].message}"
        )
        warnings.append(
            first
            if alike[0].is_final
            else f"{first}; run the same command to try {'them' if len(alike) > 1 else 'it'} again"
        )
    return warnings


def _read_record(path: Path) -> TrialRecord | None:
    content = read_json(path)
    try:
        curves = {name: tuple(content[name]) for name in ("curve", "errors")}
        return TrialRecord(**{**content, **curves})
    except (TypeError, KeyError):
        return None
