"""Values in memory, the least recently used of which make room for others."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """Values by key, each with its size. Thread-safe."""

    def __init__(self) -> None:
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.RLock()
        self.size_bytes = 0

    def __contains__(self, key: K) -> bool:
        with self._lock:
            return key in self._values

    def get(self, key: K) -> V | None:
        """The value under `key`, which is then the one used last; or None."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: K, value: V, size_bytes: int) -> None:
        """Keep a value, instead of another under the same key."""
        with self._lock:
            self.drop(key)
            self._values[key] = value, size_bytes
            self.size_bytes += size_bytes

    def drop(self, key: K) -> None:
        """Forget the value under `key`, if there is one."""
        with self._lock:
            if (dropped := self._values.pop(key, None)) is not None:
                self.size_bytes -= dropped[1]

    def trim(self, limit_bytes: int, at_least: int = 0) -> int:
        """Drop values until the others take at most `limit_bytes`, or only `at_least` are left.
        Returns how many were dropped.
        """
        with self._lock:
            before = len(self._values)
            while self.size_bytes > limit_bytes and len(self._values) > at_least:
                self.drop(next(iter(self._values)))
            return before - len(self._values)

    def keys(self) -> list[K]:
        """The keys, the least recently used first."""
        with self._lock:
            return list(self._values)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._values.clear()
            self.size_bytes = 0
