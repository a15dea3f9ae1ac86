"""Packs by name in bounded memory: loaded when first asked for, and the least recently used go
first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.adaptation import AdaptedModel
from pipeline.adaptation.flat import FlatPack
from pipeline.packs import Calibration, PackMetadata
from pipeline.serving.predictor import kind_of
from pipeline.utils.byte_cache import ByteCache


@dataclass(frozen=True, eq=False)
class ResidentPack:
    """A pack ready to predict: as flat arrays or, if it cannot share a pass, as a model of its own.
    `digest` is the SHA-256 of its file's content.
    """

    metadata: PackMetadata
    digest: str
    form: FlatPack | AdaptedModel
    size_bytes: int
    calibration: Calibration | None = None

    @property
    def is_dense(self) -> bool:
        """Whether it says a class for each pixel."""
        return kind_of(self.metadata).is_dense

    @property
    def guarantee(self) -> dict[str, float]:
        """With a calibration `coverage`, the probability that its sets hold the right class."""
        return {} if self.calibration is None else {"coverage": self.calibration.coverage}


class ResidentPacks:
    """The packs in memory. Thread-safe; a pack that is loading holds up nobody who asks for
    another.

    Args:
        load: the pack of a name; what it raises is passed on.
        capacity_bytes: of memory. A pack larger than that stays alone.
    """

    def __init__(self, load: Callable[[str], ResidentPack], capacity_bytes: int) -> None:
        self._load, self.capacity_bytes = load, capacity_bytes
        self._packs: ByteCache[str, ResidentPack] = ByteCache()
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self.loads, self.evictions = 0, 0

    @property
    def size_bytes(self) -> int:
        """Memory of the packs."""
        return self._packs.size_bytes

    def get(self, name: str) -> ResidentPack:
        """The pack of a name, loaded if it is not here; asked for twice at once, it loads once."""
        with self._lock:
            if (pack := self._packs.get(name)) is not None:
                return pack
            turn = self._loading.setdefault(name, threading.Lock())
        try:
            with turn:
                return self._packs.get(name) or self.renew(name)
        finally:
            with self._lock:
                if self._loading.get(name) is turn:
                    del self._loading[name]

    def resident(self, name: str) -> ResidentPack | None:
        """The pack of a name, if it is here."""
        return self._packs.get(name)

    def renew(self, name: str) -> ResidentPack:
        """Load a pack again; until it is here, requests get the one before."""
        pack = self._load(name)
        with self._lock:
            self._packs.put(name, pack, pack.size_bytes)
            self.loads += 1
            self.evictions += self._packs.trim(self.capacity_bytes, at_least=1)
        return pack

    def forget(self, name: str) -> None:
        """Drop a pack; requests that have it keep it to their end."""
        self._packs.drop(name)

    def names(self) -> list[str]:
        """The packs that are here, least recently used first."""
        return self._packs.keys()
