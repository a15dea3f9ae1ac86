"""Registering the packs of a batch, one at a time, with retries while the server is unreachable.

Other tasks continue meanwhile: a task that waits here holds no resources of the cluster and does not
count as running. As long as any task runs, the server is retried after 1, 2, 4, ... seconds, at most a
minute apart. Once all tasks wait for it, it is given up after `patience_seconds`. A pack that was not
registered is kept, and registered by the next run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.cluster.task_threads import Together
from pipeline.errors import RegistryAway
from pipeline.registry.pack_record import Champion, RegisteredPack

if TYPE_CHECKING:
    from pipeline.registry.store import Registry

PATIENCE_SECONDS = 900
FIRST_PAUSE_SECONDS = 1
LONGEST_PAUSE_SECONDS = 60
_LOOK_SECONDS = 0.5


class Registrar:
    """The only caller of `registry.register`. Thread-safe."""

    def __init__(self, registry: Registry, together: Together, patience_seconds: float = PATIENCE_SECONDS, *, with_trials: bool = True) -> None:
        self._registry, self._together, self._patience_seconds, self._with_trials = registry, together, patience_seconds, with_trials
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._is_given_up = False
        self._pause_seconds, self._next_try = float(FIRST_PAUSE_SECONDS), 0.0

    def register(self, champion: Champion, on_waiting: Callable[[str], None]) -> RegisteredPack:
        """Register `champion` as a version of its task; wait while the server is unreachable.

        Args:
            on_waiting: called with the reason each time the server did not answer.

        Raises:
            RegistryAway: The server stayed unreachable.
            RegistryError: The server denied access.
        """
        with self._together.aside(), self._lock:
            while True:
                self._together.pause(0)
                if time.monotonic() >= self._next_try:
                    none_runs = self._together.all_wait()
                    try:
                        registered = self._registry.register(champion, with_trials=self._with_trials)
                    except RegistryAway as error:
                        self._note_absence(none_runs)
                        on_waiting(f"waiting: {error}")
                    else:
                        self._away_since, self._pause_seconds = None, FIRST_PAUSE_SECONDS
                        return registered
                if self._is_given_up:
                    raise self._stayed_away(champion)
                self._together.pause(_LOOK_SECONDS)

    def _note_absence(self, none_runs: bool) -> None:
        now = time.monotonic()
        self._away_since = now if self._away_since is None else self._away_since
        self._is_given_up = none_runs and now - self._away_since >= self._patience_seconds
        self._next_try = now + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _stayed_away(self, champion: Champion) -> RegistryAway:
        away_seconds = time.monotonic() - (self._away_since or 0)
        return RegistryAway(
            f"the registry has been unreachable for {away_seconds:.0f} s. The pack is finished and kept ({champion.pack_path}): "
            "the same command registers it once the registry is back"
        )
