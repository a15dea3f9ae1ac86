"""What is kept of a trial, and the folder that keeps it: a study's memory across runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.storage import read_json, write_json

TrialState = Literal["complete", "stopped", "rejected", "failed"]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial.

    `id` is its recipe's key; `curve` the validation metric after each epoch; `val_metric` the last of a complete trial's curve. A rejected trial is
    over budget and never ran. `message` says why a trial failed or was rejected, or what was odd about one that came to its end. `ended` is when, in
    seconds since 1970; 0 for unknown.
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
    """A folder with one JSON file a trial, each written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[str, TrialRecord]:
        """The finished trials, by id. A file that is not a record is left out: the trial runs again."""
        records = (_read_record(path) for path in sorted(self.folder.glob("*.json")))
        return {record.id: record for record in records if record is not None}

    def write(self, record: TrialRecord) -> None:
        """Keep a finished trial. Raises StorageError."""
        write_json(self.folder / f"{record.id}.json", asdict(record))


def _read_record(path: Path) -> TrialRecord | None:
    content = read_json(path)
    try:
        return TrialRecord(**{**content, "curve": tuple(content["curve"])})
    except (TypeError, KeyError):
        return None
