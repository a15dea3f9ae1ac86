"""Quietening MLflow's warnings from several threads leaves the process's filters as they were."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

from pipeline.registry.connection import without_warnings


def test_threads_that_overlap_leave_the_filters_as_they_were() -> None:
    before = list(warnings.filters)
    first_is_in, second_tries = threading.Event(), threading.Event()

    def first() -> None:
        with without_warnings():
            first_is_in.set()
            second_tries.wait(10)
            # Without the lock the second thread enters here, and would later restore "ignore".
            threading.Event().wait(0.2)

    def second() -> None:
        first_is_in.wait(10)
        second_tries.set()
        with without_warnings():
            warnings.warn("of MLflow", stacklevel=1)
            threading.Event().wait(0.4)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            future.result()
    assert list(warnings.filters) == before
