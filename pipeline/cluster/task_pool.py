"""Concurrent tasks, each in a thread of this process, with results in order; the main thread
handles Ctrl-C.

A task's thread computes little and waits for the cluster nearly all the time, so one process drives
as many tasks as a cluster can hold. A thread passes work that must happen in the main thread, such
as starting Ray, which sets signal handlers, to it.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

LOOK_SECONDS = 1
"""Seconds between two checks of how many tasks may run: clusters grow and shrink."""
STOP_SECONDS = 5
"""Seconds that an interruption waits for threads to cancel their work on the cluster. A private Ray
shuts down with this process anyway.
"""

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


class Interrupted(BaseException):
    """Ends the thread of an interrupted run. Not an Exception, because it is no error of the
    task.
    """


def _unchanged(item: Item) -> Item:
    return item


def _number(numbered: tuple[int, object]) -> int:
    return numbered[0]


class TaskPool:
    """Run items in threads, at most `at_once()` concurrently. `running` is their number, without
    those that stand aside.
    """

    def __init__(self, at_once: Callable[[], int]) -> None:
        self.running = 0
        self._waiting = 0
        self._at_once, self._owner = at_once, threading.get_ident()
        self._stopping = threading.Event()
        self._for_main: queue.Queue[Callable[[], None]] = queue.Queue()

    def is_stopping(self) -> bool:
        """Whether threads should end as soon as they can."""
        return self._stopping.is_set()

    def pause(self, seconds: float) -> None:
        """Sleep. Raises Interrupted if the run is interrupted."""
        if self._stopping.wait(seconds):
            raise Interrupted

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A context in which another item may run in place of this one, which waits for something
        other than the cluster.
        """
        self._for_main.put(functools.partial(self._count, -1))
        try:
            yield
        finally:
            self._for_main.put(functools.partial(self._count, +1))

    def all_wait(self) -> bool:
        """Whether every unfinished item stands aside."""
        return self.running == 0 and self._waiting == 0

    def _count(self, change: int) -> None:
        self.running += change

    def run(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Run `work` on every item, started in order, and return the results in the same order. An
        exception of `work` ends the run.
        """
        return self.run_prepared(_unchanged, work, items)

    def run_prepared(
        self,
        prepare: Callable[[Item], Prepared],
        work: Callable[[Prepared], Result],
        items: Sequence[Item],
        *,
        prepare_at_once: int = 1,
    ) -> list[Result]:
        """Like `run`, but `work` gets what `prepare` returns for each item.

        Items are prepared in their own threads, at most `prepare_at_once` concurrently, however
        many items run. Prepared items start in order.
        """
        results: dict[int, Result] = {}
        waiting, ready = deque(enumerate(items)), list[tuple[int, Prepared]]()
        threads: list[threading.Thread] = []
        preparing = set[int]()

        def prepared(number: int, outcome: Future[Prepared]) -> None:
            preparing.remove(number)
            bisect.insort(ready, (number, outcome.result()), key=_number)

        def done(number: int, outcome: Future[Result]) -> None:
            self._count(-1)
            results[number] = outcome.result()

        try:
            while len(results) < len(items):
                while waiting and len(preparing) < prepare_at_once:
                    number, item = waiting.popleft()
                    preparing.add(number)
                    threads.append(self._start(prepare, item, functools.partial(prepared, number)))
                while ready and self.running < self._at_once():
                    number, value = ready.pop(0)
                    self._count(+1)
                    threads.append(self._start(work, value, functools.partial(done, number)))
                self._waiting = len(waiting) + len(preparing) + len(ready)
                self._serve()
        finally:
            self._stopping.set()
            deadline = time.monotonic() + STOP_SECONDS
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        return [results[number] for number in range(len(items))]

    def _start(
        self,
        work: Callable[[Any], Result],
        item: object,
        take: Callable[[Future[Result]], None],
    ) -> threading.Thread:
        """A thread that works on an item; the main thread takes the outcome."""
        outcome: Future[Result] = Future()

        def run() -> None:
            try:
                outcome.set_result(work(item))
            except BaseException as error:  # any exception is passed to the main thread
                outcome.set_exception(error)
            self._for_main.put(lambda: take(outcome))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def _serve(self) -> None:
        try:
            self._for_main.get(timeout=LOOK_SECONDS)()
        except queue.Empty:
            return

    def on_main_thread(self, action: Callable[[], Result]) -> Result:
        """Run an action in the main thread and wait for it."""
        if threading.get_ident() == self._owner:
            return action()
        outcome: Future[Result] = Future()

        def act() -> None:
            try:
                outcome.set_result(action())
            except Exception as error:
                outcome.set_exception(error)

        self._for_main.put(act)
        while not self.is_stopping():
            try:
                return outcome.result(timeout=LOOK_SECONDS)
            except TimeoutError:
                continue
        raise Interrupted
