"""What is kept of a trial, and the folder that keeps it: a study's memory across runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import OutOfMemory, TaskpackError, TrainingError
from pipeline.utils.files import explained, read_json, write_json

TrialState = Literal["complete", "stopped", "rejected", "failed"]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial.

    `id` is its recipe's key; `curve` the validation metric after each epoch; `val_metric` the
    last of a complete trial's curve. A rejected trial is over budget and never ran. `message`
    says why a trial failed or was rejected, or what was odd about one that came to its end.
    `error` is the name of the error that it failed with; `ended` is when, in seconds since 1970,
    0 for unknown.
    """

    id: str
    point: dict[str, Any]
    size_bytes: int
    state: TrialState
    val_metric: float | None = None
    curve: tuple[float, ...] = field(default=())
    seconds: float = 0.0
    ended: float = 0.0
    message: str = ""
    error: str = ""

    @property
    def is_final(self) -> bool:
        """Whether the trial would end so again: of failures, those of its recipe on its device, but not one of a worker or of code."""
        return self.error in ("", TrainingError.__name__, OutOfMemory.__name__)

    def row(self) -> dict[str, Any]:
        """As plain data, for tables, figures and the registry."""
        return {**asdict(self), "curve": list(self.curve), "epochs": len(self.curve)}

    def line(self) -> str:
        """In a few words, for a log: `complete, validation 0.8125, 3046 bytes, 12.3 s`."""
        metric = self.curve[-1] if self.curve else self.val_metric
        validation = [] if metric is None else [f"validation {metric:.4f}"]
        reason = f" - {self.message.splitlines()[0][:300]}" if self.message else ""
        return ", ".join([self.state, *validation, f"{self.size_bytes} bytes", f"{self.seconds:.1f} s"]) + reason


class TrialJournal:
    """A folder with one JSON file a trial, each written whole or not at all. Tracebacks of failures go to `log`."""

    def __init__(self, folder: Path, log: Path | None = None) -> None:
        self.folder, self._log = folder, log or folder / "log.txt"

    def read(self) -> dict[str, TrialRecord]:
        """The finished trials, by id. A file that is not a record is left out: the trial runs again."""
        records = (_read_record(path) for path in sorted(self.folder.glob("*.json")))
        return {record.id: record for record in records if record is not None}

    def write(self, record: TrialRecord) -> None:
        """Keep a finished trial, unless it may end otherwise the next time. Raises StorageError."""
        if record.is_final:
            write_json(self._path(record.id), asdict(record))

    def failure(self, trial: str, fault: TaskpackError) -> dict[str, Any]:
        """What a record says of the error that a trial failed with."""
        message = explained(fault, self._log, f"trial {trial}")
        if isinstance(fault, OutOfMemory):
            message += f". To try this trial again with more memory, remove {self._path(trial)}"
        return {"state": "failed", "error": type(fault).__name__, "message": message}

    def _path(self, trial: str) -> Path:
        return self.folder / f"{trial}.json"


def failure_warnings(records: Sequence[TrialRecord]) -> list[str]:
    """Of each kind of failure among a study's trials, how many there were, and the first of them."""
    failed: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.state == "failed":
            failed.setdefault(record.error, []).append(record)
    warnings = []
    for alike in failed.values():
        first = f"{len(alike)} of {len(records)} trials failed{', the first' if len(alike) > 1 else ''}: {alike[0].message}"
        warnings.append(first if alike[0].is_final else f"{first}; the same command tries {'them' if len(alike) > 1 else 'it'} again")
    return warnings


def _read_record(path: Path) -> TrialRecord | None:
    content = read_json(path)
    try:
        return TrialRecord(**{**content, "curve": tuple(content["curve"])})
    except (TypeError, KeyError):
        return None
