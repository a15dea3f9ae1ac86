"""Decoded images in memory that all taskpack processes of a user on a machine share.

Every array is a file in a folder that the system keeps in memory (`/dev/shm`), so the trials on a
machine decode each image once. The least recently opened files make room for others. The last
process that leaves the folder empties it; after a kill, the last of the next run does.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.errors import DataError

LIMIT_VARIABLE = "TASKPACK_DECODED_GB"
_SYSTEM_FOLDER = Path("/dev/shm")
_SHARE_OF_MEMORY = 8
"""Ray's object store may take three tenths of the memory, from the half that the folder has."""
_SHARE_OF_FOLDER = 4
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class NodeMemory:
    """Named arrays of bytes in `folder`, at most `limit_bytes` in total. Safe to share between
    processes and threads.

    An array that was removed to make room stays valid for those who have it, and takes memory for
    as long as they do.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._lock: int | None = None

    def array(self, name: str, size_bytes: int) -> np.ndarray | None:
        """The array called `name`, uint8 [size_bytes], filled with zeros by whoever asks first;
        None where the folder cannot hold it.
        """
        if size_bytes > self.limit_bytes:
            return None
        try:
            self._enter()
            path = self.folder / name
            if not path.exists():
                self._make_room(size_bytes)
            return _mapped(path, size_bytes)
        except OSError:  # no such folder, another's folder, or a full one
            return None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep what other processes decode until this context ends: one run's trials find what the
        last one's decoded.
        """
        if self.limit_bytes:
            with contextlib.suppress(OSError):
                self._enter()
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """Let go of the folder, and empty it if no other process uses it."""
        if self._lock is None:
            return
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self._arrays():
                path.unlink()
        os.close(self._lock)
        self._lock = None

    def _enter(self) -> None:
        if self._lock is not None:
            return
        import fcntl  # which only systems with such a folder have

        self.folder.mkdir(mode=0o700, exist_ok=True)
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "another user may write here", str(self.folder))
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
        except OSError:
            os.close(lock)
            raise
        self._lock = lock

    def _make_room(self, size_bytes: int) -> None:
        """Remove the least recently opened arrays until one of `size_bytes` fits."""
        arrays = sorted((path.stat().st_mtime_ns, path) for path in self._arrays())
        taken_bytes = sum(path.stat().st_size for _, path in arrays)
        for _, path in arrays:
            if taken_bytes + size_bytes <= self.limit_bytes:
                return
            taken_bytes -= path.stat().st_size
            path.unlink(missing_ok=True)

    def _arrays(self) -> list[Path]:
        return list(self.folder.iterdir())


def _mapped(path: Path, size_bytes: int) -> np.ndarray:
    """A file as an array in memory, made if it is missing. Raises OSError where it does not fit:
    memory that is reserved only when it is touched would end the process instead.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(file, 0, size_bytes)
        os.utime(file)
        return np.frombuffer(mmap.mmap(file, size_bytes), np.uint8)
    except OSError:
        if os.fstat(file).st_size < size_bytes:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


@functools.cache
def node_memory() -> NodeMemory:
    """This machine's shared memory for decoded images. `$TASKPACK_DECODED_GB` bounds it; by default
    it takes at most an eighth of the machine's memory, and 0 turns it off. Raises DataError.
    """
    given = os.environ.get(LIMIT_VARIABLE)
    try:
        limit_bytes = _default_limit_bytes() if given is None else int(float(given) * 1e9)
        if limit_bytes < 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise DataError(
            f"{LIMIT_VARIABLE}: given {given!r}; expected how many GB of decoded images the"
            " processes of this machine may share, such as 16, or 0 for none"
        ) from None
    if not _SYSTEM_FOLDER.is_dir():
        return NodeMemory(_SYSTEM_FOLDER, 0)
    memory = NodeMemory(_SYSTEM_FOLDER / f"taskpack-{os.getuid()}", limit_bytes)
    atexit.register(memory.leave)
    return memory


def _default_limit_bytes() -> int:
    if not _SYSTEM_FOLDER.is_dir():
        return 0
    folder = os.statvfs(_SYSTEM_FOLDER)
    folder_bytes = folder.f_blocks * folder.f_frsize
    return min(_memory_bytes() // _SHARE_OF_MEMORY, folder_bytes // _SHARE_OF_FOLDER)


def _memory_bytes() -> int:
    """The memory of this machine, or of the container that this process runs in."""
    sizes_bytes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" stands for no limit
            sizes_bytes.append(int(Path(path).read_text()))
    return min(sizes_bytes)
