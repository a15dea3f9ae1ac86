"""Tasks side by side: never more than fit, results in order, the main thread serves, an
interruption reaches every thread.
"""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.cluster.task_pool import Interrupted, TaskPool

SECONDS = 10


class Meeting:
    """Work that ends only once `size` others are at it, so that it can be seen how many run at a
    time.
    """

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.now = self.most = 0
        self.lock = threading.Lock()

    def work(self, item: int) -> int:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.barrier.wait(SECONDS)
        with self.lock:
            self.now -= 1
        return item * item


def test_as_many_run_as_may_and_results_come_in_order() -> None:
    meeting = Meeting(3)
    assert TaskPool(lambda: 3).run(meeting.work, range(9)) == [item * item for item in range(9)]
    assert meeting.most == 3


def test_more_run_once_more_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that grows: with one at a time the two would wait for each other for ever."""
    monkeypatch.setattr("pipeline.cluster.task_pool.LOOK_SECONDS", 0.01)
    asked: list[int] = []
    meeting = Meeting(2)

    def at_once() -> int:
        asked.append(1)
        return 1 if len(asked) < 20 else 2

    assert TaskPool(at_once).run(meeting.work, [1, 2]) == [1, 4]


def test_an_item_runs_while_later_ones_are_prepared() -> None:
    first_runs = threading.Event()

    def prepare(item: int) -> int:
        if item == 3:
            assert first_runs.wait(SECONDS), "nothing ran before all were prepared"
        return 10 * item

    def work(prepared: int) -> int:
        first_runs.set()
        return prepared + 1

    found = TaskPool(lambda: 1).run_prepared(prepare, work, [1, 2, 3], prepare_at_once=2)
    assert found == [11, 21, 31]


def test_all_are_prepared_whatever_else_runs() -> None:
    """A fault in the last item's data shows while the first is at work."""
    prepared, last_is_prepared = [], threading.Event()

    def prepare(item: int) -> int:
        prepared.append(item)
        if item == 5:
            last_is_prepared.set()
        return item

    def work(item: int) -> bool:
        return last_is_prepared.wait(SECONDS)

    pool = TaskPool(lambda: 1)
    assert pool.run_prepared(prepare, work, range(6), prepare_at_once=2) == [True] * 6
    assert sorted(prepared) == list(range(6))


def test_a_fault_of_preparation_ends_the_run() -> None:
    def prepare(item: int) -> int:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 1"):
        TaskPool(lambda: 1).run_prepared(prepare, lambda item: item, [1])


def test_who_stands_aside_leaves_the_place_to_another() -> None:
    pool = TaskPool(lambda: 1)
    second_ran = threading.Event()

    def work(item: str) -> bool:
        if item == "second":
            second_ran.set()
            return True
        with pool.aside():
            return second_ran.wait(SECONDS)

    assert pool.run(work, ["first", "second"]) == [True, True]
    assert pool.running == 0


def test_all_wait_once_nothing_is_left_to_start() -> None:
    pool = TaskPool(lambda: 1)
    seen: list[bool] = []

    def work(item: int) -> None:
        seen.append(pool.all_wait())
        with pool.aside():
            deadline = time.monotonic() + SECONDS
            while not pool.all_wait() and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(pool.all_wait())

    pool.run(work, [1, 2])
    assert seen == [False, False, True, True]


def test_the_main_thread_does_what_only_it_may() -> None:
    pool = TaskPool(lambda: 2)

    def fail() -> None:
        raise OSError("no")

    def work(item: int) -> tuple[bool, bool]:
        with pytest.raises(OSError, match="no"):
            pool.on_main_thread(fail)
        return threading.current_thread() is threading.main_thread(), pool.on_main_thread(
            lambda: threading.current_thread() is threading.main_thread()
        )

    assert pool.run(work, [1, 2]) == [(False, True)] * 2
    assert pool.on_main_thread(lambda: 5) == 5


def test_what_work_raises_is_raised_and_ends_the_others() -> None:
    pool = TaskPool(lambda: 2)
    ended: list[str] = []

    def work(item: str) -> None:
        if item == "broken":
            raise ZeroDivisionError("a mistake of ours")
        try:
            pool.pause(SECONDS)
        except Interrupted:
            ended.append(item)
            raise

    with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
        pool.run(work, ["patient", "broken", "never started"])
    assert ended == ["patient"]


def test_an_interruption_reaches_threads_that_wait_for_the_main_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.cluster.task_pool.LOOK_SECONDS", 0.01)
    pool = TaskPool(lambda: 1)
    ended = threading.Event()

    def interrupt() -> None:
        raise KeyboardInterrupt

    def work(item: int) -> None:
        try:
            pool.on_main_thread(interrupt)
        except Interrupted:
            ended.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        pool.run(work, [1])
    assert ended.is_set()
