"""The packs of a registry by the names that requests give, and where their aliases are now."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

from pipeline.packs import content_digest
from pipeline.registry.pack_record import RegisteredPack
from pipeline.registry.store import Registry


class Catalogue:
    """Packs of a registry by reference: `flowers` (its champion) or `flowers@alias`. Thread-safe.

    Args:
        folder: where packs are downloaded to.
    """

    def __init__(self, registry: Registry, folder: Path) -> None:
        self.registry, self._folder = registry, folder
        self._latest: dict[str, int] = {}
        self._read: dict[str, dict[str, RegisteredPack]] = defaultdict(dict)
        self._lock = threading.Lock()

    def read(self, reference: str) -> bytes:
        """The content of the pack that a reference names now. Raises RegistryError."""
        registered = self.registry.get(reference)
        content = self.registry.download(registered, self._folder).read_bytes()
        with self._lock:
            self._latest[reference] = registered.version
            self._read[reference][content_digest(content)] = registered
        return content

    def registered(self, reference: str, digest: str | None) -> RegisteredPack:
        """The version whose file, as it was read, has this digest; without one, the version that
        the reference names now. Raises RegistryError.
        """
        with self._lock:
            known = self._read[reference].get(digest) if digest is not None else None
        return known or self.registry.get(reference)

    def keep(self, reference: str, digest: str) -> None:
        """Forget the versions of a reference but the one whose file has this digest."""
        with self._lock:
            known = self._read[reference]
            self._read[reference] = {digest: known[digest]} if digest in known else {}

    def moved(self, references: list[str]) -> list[str]:
        """Those of the references that name another version than was read last, so that a version
        that cannot be used is read once. Raises RegistryError.
        """
        versions = self.registry.versions(references)
        with self._lock:
            return [
                reference
                for reference, version in versions.items()
                if self._latest.get(reference, version) != version
            ]
