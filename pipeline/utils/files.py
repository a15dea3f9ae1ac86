"""Atomic writes of small files, a log of tracebacks, and folder locks."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import StorageError, TaskpackError, UnexpectedError

SEEN_SECONDS = 90
LOG_BYTES = 1_000_000


def user_cache() -> Path:
    """The folder that this user's runs cache results in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taskpack"


def write_json(path: Path, content: Any, *, indent: int | None = 1) -> None:
    """Write JSON atomically, making its folder; without `indent` several times faster.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    scratch = path.with_name(
        f".{path.name}.{secrets.token_hex(4)}"
    )  # not the process: two machines may write into one folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(
            json.dumps(content, indent=indent, sort_keys=True) + "\n", encoding="utf-8"
        )
        os.replace(scratch, path)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}); free space, or choose another folder"
        ) from None


def explained(fault: TaskpackError, log: Path, of: str) -> str:
    """The message of an error. If it has a traceback, that is appended to `log` under the heading
    `of`, and the message says so.

    A long log is started over. Failure to write it is ignored.
    """
    if not isinstance(fault, UnexpectedError):
        return str(fault)
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        is_long = log.exists() and log.stat().st_size > LOG_BYTES
        with log.open("w" if is_long else "a", encoding="utf-8") as file:
            file.write(
                f"{time.strftime('%Y-%m-%d %H:%M:%S')} {of}: {fault}\n{fault.details.rstrip()}\n\n"
            )
    return f"{fault}; details in {log}"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Context manager: a temporary path next to `path` for a new file or folder, which is moved to
    `path` on success and removed otherwise.

    Raises:
        StorageError: `path` exists, the disk is full or the folder cannot be written.
    """
    if path.exists():
        raise StorageError(f"{path}: exists already; remove it, or choose another name")
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        os.rename(scratch, path)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}); free space, or choose another folder"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            scratch.unlink()


def await_file(path: Path) -> None:
    """Wait until a file that another machine has written is seen here: a network file system may
    take a minute.

    Raises:
        StorageError: it is not seen.
    """
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise StorageError(
                f"{path}: a worker has written this file, and it is not seen here; --workdir must"
                " be a folder that every node shares"
            )
        time.sleep(0.5)


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder alone: the lock ends with the process, however that ends. Raises StorageError
    where another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:
        raise StorageError(
            f"{folder}: another taskpack run is using this folder; wait for it, or give another"
            " --workdir"
        ) from None
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written ({error.strerror}); choose another --workdir"
        ) from None
    with lock:
        yield
