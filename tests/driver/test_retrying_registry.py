"""Registering with patience: a server that comes back is waited for, one that stays silent is given
up at the end, a refusal is one at once.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.task_pool import TaskPool
from pipeline.driver import retrying_registry as retrying_module
from pipeline.driver.retrying_registry import RetryingRegistry
from pipeline.errors import RegistryError, RegistryUnreachable
from pipeline.registry.pack_record import Champion

SECONDS = 10


def champion(task: str) -> Champion:
    return Champion(
        task=task,
        pack_path=Path("runs") / task / "pack.safetensors",
        pack_digest="",
        size_bytes=0,
        ledger={},
        metrics={},
    )


class Server:
    """Stands in for the registry: unreachable until `back` is set; refuses the task `refused`."""

    def __init__(self) -> None:
        self.back = threading.Event()
        self.asked: list[str] = []
        self.registered: list[str] = []
        self._writer = threading.Lock()

    def register(self, champion: Champion, *, with_trials: bool) -> Any:
        assert self._writer.acquire(blocking=False), "two threads write at a time"
        try:
            self.asked.append(champion.task)
            if not self.back.is_set():
                raise RegistryUnreachable("the server cannot be reached; check that it runs")
            if champion.task == "refused":
                raise RegistryError("not allowed")
            self.registered.append(champion.task)
            return champion.task
        finally:
            self._writer.release()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying_module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(retrying_module, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retrying_module, "LONGEST_PAUSE_SECONDS", 0.05)


def run(
    server: Server, tasks: list[str], patience_seconds: float, last: Any = lambda: None
) -> tuple[list[Any], list[str]]:
    """Every task's outcome with one task at a time, and what was remarked; the task `last` does
    something before it registers.
    """
    pool, remarks = TaskPool(lambda: 1), []
    registry = RetryingRegistry(server, pool, patience_seconds)  # type: ignore[arg-type]

    def work(task: str) -> Any:
        if task == "last":
            last()
        try:
            return registry.register(champion(task), remarks.append)
        except RegistryError as error:
            return error

    return pool.run(work, tasks), remarks


def test_others_go_on_while_the_server_is_silent_and_all_are_registered_later() -> None:
    server = Server()
    outcomes, remarks = run(server, ["a", "b", "last"], patience_seconds=0, last=server.back.set)
    assert sorted(server.registered) == outcomes == ["a", "b", "last"]
    assert remarks
    assert set(remarks) == {"waiting: the server cannot be reached; check that it runs"}


def test_a_server_that_stays_silent_is_given_up_and_the_pack_is_named() -> None:
    server = Server()
    outcomes, _ = run(server, ["a", "b"], patience_seconds=0.3)
    assert [type(outcome) for outcome in outcomes] == [RegistryUnreachable] * 2
    assert (
        "(runs/a/pack.safetensors): the same command registers it once the registry answers again"
        in str(outcomes[0])
    )
    assert server.registered == []
    assert 3 <= len(server.asked) <= 12, "asked a few times, ever less often"


def test_patience_is_not_counted_while_a_task_still_runs() -> None:
    server = Server()

    def work_long() -> None:
        for _ in range(100):
            if len(server.asked) > 5:  # away for many times the patience by now
                break
            threading.Event().wait(0.05)
        server.back.set()

    outcomes, _ = run(server, ["a", "last"], patience_seconds=0.01, last=work_long)
    assert outcomes == ["a", "last"]


def test_a_refusal_is_the_tasks_own_and_is_not_repeated() -> None:
    server = Server()
    server.back.set()
    outcomes, remarks = run(server, ["a", "refused", "b"], patience_seconds=SECONDS)
    assert [str(outcome) for outcome in outcomes] == ["a", "not allowed", "b"]
    assert (server.asked, remarks) == (["a", "refused", "b"], [])
