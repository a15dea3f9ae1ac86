"""Whether the local shards of a prepared dataset are intact, without reading them each time.

A shard that was read and had the right SHA-256 is noted with the size, times and inode of its file.
Whoever writes to a file changes the time of its status, which programs cannot set, so a file with
the same ones is the same. A file that was written within the clock's resolution of a note could
change without a sign, so files are noted only when all have been left alone for a while.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from pipeline.data.index import DataIndex, ShardEntry
from pipeline.data.sources import stamp_of
from pipeline.data.urls import is_url, resolve, sha256_hex
from pipeline.errors import StorageError
from pipeline.utils.files import read_json, write_json

VERIFIED_NAME = "verified.json"
_SETTLED_NS = 2_000_000_000
"""Coarser than the clock of any file system."""


def are_intact(folder: Path, index: DataIndex) -> bool:
    """Whether all local shards of the dataset in `folder` are as its index says. Those that are not
    known to be are read, and noted.
    """
    before = read_json(folder / VERIFIED_NAME)
    known = before if isinstance(before, dict) else {}
    notes: dict[str, str] = {}
    written_ns = 0
    for shard in index.shards:
        url = resolve(folder, shard.path)
        if is_url(url):
            continue
        if not (path := Path(url)).is_file():
            return False
        status = path.stat()
        note = f"{shard.sha256} {stamp_of(status)}"
        if known.get(shard.path) != note and not _is_as_indexed(path, shard):
            return False
        notes[shard.path] = note
        written_ns = max(written_ns, status.st_ctime_ns)
    if notes != known and time.time_ns() - written_ns > _SETTLED_NS:
        with contextlib.suppress(StorageError):  # shards are read again the next time
            write_json(folder / VERIFIED_NAME, notes)
    return True


def forget(folder: Path) -> None:
    """Have the shards of the dataset in `folder` read again, because one is damaged."""
    with contextlib.suppress(OSError):
        (folder / VERIFIED_NAME).unlink()


def _is_as_indexed(path: Path, shard: ShardEntry) -> bool:
    return path.stat().st_size == shard.size_bytes and sha256_hex(path.read_bytes()) == shard.sha256
