"""Registering the packs of a batch: one at a time, with patience for a server that does not answer.

The tasks that still run go on meanwhile: whoever waits here holds no place of the cluster and of
the tasks that run at once. As long as any runs, the server is asked again and again, after 1, 2, 4,
... seconds, at most a minute apart. Once all tasks wait for the server, it is given up when it has
not answered for `patience_seconds`. A pack that was not registered is kept where it is, and
registered by the next run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.cluster.task_pool import TaskPool
from pipeline.errors import RegistryUnreachable
from pipeline.registry.pack_record import Champion, RegisteredPack

if TYPE_CHECKING:
    from pipeline.registry.store import Registry

PATIENCE_SECONDS = 900
FIRST_PAUSE_SECONDS = 1
LONGEST_PAUSE_SECONDS = 60
_LOOK_SECONDS = 0.5


class RetryingRegistry:
    """The only caller of `registry.register`, from any thread."""

    def __init__(
        self,
        registry: Registry,
        pool: TaskPool,
        patience_seconds: float = PATIENCE_SECONDS,
        *,
        with_trials: bool = True,
    ) -> None:
        self._registry, self._pool, self._patience_seconds, self._with_trials = (
            registry,
            pool,
            patience_seconds,
            with_trials,
        )
        self._lock = threading.Lock()
        self._silent_since: float | None = None
        self._is_given_up = False
        self._pause_seconds, self._next_try = float(FIRST_PAUSE_SECONDS), 0.0

    def register(self, champion: Champion, on_waiting: Callable[[str], None]) -> RegisteredPack:
        """`champion` as a version of its task; waits while the server does not answer.

        Args:
            on_waiting: is told why it waits, each time the server did not answer.

        Raises:
            RegistryUnreachable: it did not answer for `patience_seconds`.
            RegistryError: it answers, and refused.
        """
        with self._pool.aside(), self._lock:
            while True:
                self._pool.pause(0)
                if time.monotonic() >= self._next_try:
                    none_runs = self._pool.all_wait()
                    try:
                        registered = self._registry.register(
                            champion, with_trials=self._with_trials
                        )
                    except RegistryUnreachable as error:
                        self._note_silence(none_runs)
                        on_waiting(f"waiting: {error}")
                    else:
                        self._silent_since, self._pause_seconds = None, FIRST_PAUSE_SECONDS
                        return registered
                if self._is_given_up:
                    raise self._given_up(champion)
                self._pool.pause(_LOOK_SECONDS)

    def _note_silence(self, none_runs: bool) -> None:
        now = time.monotonic()
        self._silent_since = now if self._silent_since is None else self._silent_since
        self._is_given_up = none_runs and now - self._silent_since >= self._patience_seconds
        self._next_try = now + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _given_up(self, champion: Champion) -> RegistryUnreachable:
        silent_seconds = time.monotonic() - (self._silent_since or 0)
        return RegistryUnreachable(
            f"the registry has not answered for {silent_seconds:.0f} s. The pack is finished and"
            f" kept ({champion.pack_path}): the same command registers it once the registry answers"
            " again"
        )
