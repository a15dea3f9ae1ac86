"""Tasks side by side: each in a thread of this process, results in the order given, Ctrl-C with the main thread.

A task's thread computes little and waits for the cluster nearly all the time, so one process drives as many tasks as a cluster can hold, and holds
no worker's place while it waits. What has to happen in the main thread, such as starting Ray, which sets signal handlers, a thread hands over to it.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

LOOK_SECONDS = 1
"""How often it is asked anew how many fit: clusters grow and shrink."""
STOP_SECONDS = 5
"""How long an interruption waits for threads to take their work off the cluster. On a Ray that goes with this process, the rest goes with it."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Interrupted(BaseException):
    """Ends a thread whose run was interrupted. No Exception: it is no error of the task."""


class Together:
    """Runs items in threads, at most `at_once()` at a time. `running` is how many there are now, without those that stand aside."""

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
        """Wait. Raises Interrupted where the run is interrupted."""
        if self._stopping.wait(seconds):
            raise Interrupted

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """While this thread waits for something other than the cluster, another item may run in its place."""
        self._for_main.put(functools.partial(self._count, -1))
        try:
            yield
        finally:
            self._for_main.put(functools.partial(self._count, +1))

    def all_wait(self) -> bool:
        """Whether every item that has not ended stands aside."""
        return self.running == 0 and self._waiting == 0

    def _count(self, change: int) -> None:
        self.running += change

    def run(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`work` on every item, started in their order; its results in the same order. What `work` raises ends the run."""
        results: dict[int, Result] = {}
        waiting, threads = deque(enumerate(items)), []

        def take(number: int, outcome: Future[Result]) -> None:
            self._count(-1)
            results[number] = outcome.result()

        def start(number: int, item: Item) -> threading.Thread:
            outcome: Future[Result] = Future()

            def run() -> None:
                try:
                    outcome.set_result(work(item))
                except BaseException as error:  # whatever it is, it is the main thread's
                    outcome.set_exception(error)
                self._for_main.put(lambda: take(number, outcome))

            self._count(+1)
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            return thread

        try:
            while len(results) < len(items):
                while waiting and self.running < self._at_once():
                    threads.append(start(*waiting.popleft()))
                self._waiting = len(waiting)
                self._serve()
        finally:
            self._stopping.set()
            deadline = time.monotonic() + STOP_SECONDS
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        return [results[number] for number in range(len(items))]

    def _serve(self) -> None:
        try:
            self._for_main.get(timeout=LOOK_SECONDS)()
        except queue.Empty:
            return

    def on_main_thread(self, action: Callable[[], Result]) -> Result:
        """Have the thread that this belongs to do something, and wait for it."""
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
