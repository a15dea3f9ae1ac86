"""The event log of a batch: one JSON object per line, in a file of bounded size, without secrets.

A full file becomes `batch.jsonl.1`, replacing an older one, so the newest events are always kept.
If the log cannot be written, the event is lost and the batch continues.
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
"""Size limit of each of the two files."""
TEXT_CHARACTERS = 500
"""Maximum length of a text in an event."""


class EventLog:
    """Append events to `path`, each with the time and the fields of `always`. Thread-safe."""

    def __init__(self, path: Path, **always: Any) -> None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._always = always
        self._file = _QuietFile(
            path, maxBytes=FILE_BYTES, backupCount=1, encoding="utf-8", delay=True
        )

    def write(self, event: str, **fields: Any) -> None:
        """Append an event; fields that are None are left out."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        known = {
            key: value
            for key, value in {"time": time, **self._always, "event": event, **fields}.items()
            if value is not None
        }
        kept = {
            key: without_secrets(value)[:TEXT_CHARACTERS] if isinstance(value, str) else value
            for key, value in known.items()
        }
        self._file.handle(
            logging.makeLogRecord({"msg": json.dumps(kept, ensure_ascii=False, default=str)})
        )

    def close(self) -> None:
        """Close the log; later events are dropped."""
        with contextlib.suppress(OSError):  # what a full disk did not take before
            self._file.close()


class _QuietFile(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a full disk or a missing folder: the event is lost."""
