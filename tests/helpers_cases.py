"""One test for many cases: a loop that names the case with which it failed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def for_every(
    names: str | tuple[str, ...], cases: Iterable[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: run a test for every case, as one test. Decorators on top of each other run it for
    every combination.

    It takes what `pytest.mark.parametrize` takes: the name of an argument and its values, or
    several names and tuples of values. An error gets a note that names the case. Each case has a
    `tmp_path` of its own; all cases share the other fixtures.
    """
    given = [(case,) if isinstance(names, str) else case for case in cases]
    looped = (names,) if isinstance(names, str) else names

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            for number, values in enumerate(given):
                case = dict(zip(looped, values, strict=True))
                own = fixtures | case
                if "tmp_path" in fixtures:
                    own["tmp_path"] = fixtures["tmp_path"] / str(number)
                    own["tmp_path"].mkdir()
                try:
                    test(**own)
                except BaseException as error:
                    error.add_note(f"with {case}")
                    raise

        parameters = inspect.signature(test).parameters
        others = [each for name, each in parameters.items() if name not in looped]
        run.__signature__ = inspect.Signature(others)  # type: ignore[attr-defined]
        return run

    return decorate
