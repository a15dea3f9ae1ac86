"""A disk cache of shards behind URLs: each is fetched once for all processes, tasks and epochs.

A file's name is its content's SHA-256, unlike in WebDataset's own cache, which uses the last part
of the URL: two tasks may both have a `train-000000.tar`. The size of the folder is bounded; the
least recently read file is evicted first.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from filelock import FileLock

from pipeline.data.urls import fetch, sha256_hex
from pipeline.errors import DataError
from pipeline.utils.files import user_cache

FOLDER_VARIABLE = "TASKPACK_SHARDS"
LIMIT_VARIABLE = "TASKPACK_SHARDS_GB"
DEFAULT_LIMIT_GB = 50.0


class ShardStore:
    """Shards by SHA-256 in `folder`, at most `limit_bytes` in total. Safe to share between
    processes.
    """

    def __init__(self, folder: Path, limit_bytes: float) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def read(self, url: str, sha256: str) -> bytes:
        """The content of the shard at `url`; the first process fetches it, the others wait. Raises
        DataError if it cannot be read, or differs.

        If the folder is full or cannot be written, the shard is fetched every time.
        """
        path = self.folder / sha256
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(f"{path}.lock"))
            content = _kept(path, sha256)
            if content is None:
                content = fetch_checked(url, sha256)
                self.keep(content, sha256)
        return content

    def keep(self, content: bytes, sha256: str) -> None:
        """Add a shard that was fetched already, if the folder can be written."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(self.folder / sha256, content)

    def _write(self, path: Path, content: bytes) -> None:
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            scratch.write_bytes(content)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        _mark_read(path)
        self._bound(newest=path)

    def _bound(self, newest: Path) -> None:
        """Remove the least recently read files until the rest fits; the newest is kept at any
        size.
        """
        shards = sorted(
            (each for each in self.folder.iterdir() if not each.suffix and each.name[0] != "."),
            key=lambda each: each.stat().st_mtime_ns,
        )
        size_bytes = sum(each.stat().st_size for each in shards)
        for each in shards:
            if size_bytes <= self.limit_bytes:
                return
            if each != newest:
                size_bytes -= each.stat().st_size
                each.unlink()
                Path(f"{each}.lock").unlink(missing_ok=True)


def _kept(path: Path, sha256: str) -> bytes | None:
    """The content on disk; None if it is missing or damaged."""
    try:
        content = path.read_bytes()
        _mark_read(path)
    except OSError:
        return None
    return content if sha256_hex(content) == sha256 else None


def _mark_read(path: Path) -> None:
    """Note the time of reading as that of the last change, in nanoseconds: the system's own are
    some milliseconds apart.
    """
    now_ns = time.time_ns()
    os.utime(path, ns=(now_ns, now_ns))


def fetch_checked(url: str, sha256: str) -> bytes:
    """The content at a path or URL. Raises DataError if it cannot be read, or is not what was
    indexed.
    """
    content = fetch(url)
    if sha256_hex(content) != sha256:
        raise DataError(
            f"{url}: damaged, or changed since it was indexed (its SHA-256 differs); prepare the"
            " dataset again"
        )
    return content


def shard_store() -> ShardStore:
    """The store of this machine: `$TASKPACK_SHARDS`, or a folder of the user's cache;
    `$TASKPACK_SHARDS_GB` bounds it. Raises DataError.
    """
    folder = os.environ.get(FOLDER_VARIABLE) or user_cache() / "shards"
    limit = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_GB))
    try:
        return ShardStore(Path(folder), float(limit) * 1e9)
    except ValueError:
        raise DataError(
            f"{LIMIT_VARIABLE}: given {limit!r}; expected how many GB of shards to keep, such as 50"
        ) from None
