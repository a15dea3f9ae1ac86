"""A batch's log of events: one JSON line an event, in a file of bounded size, without secrets.

When the file is full it becomes `batch.jsonl.1`, in place of an older one, so the newest events are always kept. A log that cannot be written is no
reason to end a batch: the event is lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from pipeline.utils.redaction import without_secrets

FILE_BYTES = 16 * 2**20
"""Of each of the two files."""
TEXT_CHARACTERS = 500
"""Longest text of an event."""


class EventLog:
    """Appends events to `path`; every one carries the time and the fields of `always`. May be used from several threads."""

    def __init__(self, path: Path, **always: Any) -> None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._always = always
        self._file = _QuietFile(path, maxBytes=FILE_BYTES, backupCount=1, encoding="utf-8", delay=True)

    def write(self, event: str, **fields: Any) -> None:
        """Add an event; fields that are None are left out."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        known = {key: value for key, value in {"time": time, **self._always, "event": event, **fields}.items() if value is not None}
        kept = {key: without_secrets(value)[:TEXT_CHARACTERS] if isinstance(value, str) else value for key, value in known.items()}
        self._file.handle(logging.makeLogRecord({"msg": json.dumps(kept, ensure_ascii=False, default=str)}))

    def close(self) -> None:
        """Nothing is written after this."""
        with contextlib.suppress(OSError):  # what a full disk did not take before
            self._file.close()


class _QuietFile(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """The disk is full, or the folder is gone."""
