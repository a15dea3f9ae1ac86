"""What a session changes in this process."""

from __future__ import annotations

import gc
import weakref

import pytest

from pipeline.cluster.session import ray_session


class Ring:
    """Holds itself."""

    def __init__(self) -> None:
        self.itself = self


def test_the_collector_finds_what_a_session_leaves_and_is_spared_the_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    older = Ring()
    of_older = weakref.ref(older)
    with ray_session():
        assert gc.get_freeze_count() > 100_000
        of_younger = weakref.ref(Ring())
        del older
        gc.collect()
        assert of_younger() is None
        assert of_older() is not None, "as the libraries, it is not looked at"
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert of_older() is None
