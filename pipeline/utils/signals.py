"""Ctrl-C and SIGTERM: both end a command by an exception in its main thread.

SIGTERM is what `kill`, job schedulers and Kubernetes send. Shells start background jobs, and some
CI runners start everything, with SIGINT ignored, so Python itself would not install its handler; it
is installed here in any case. Ray replaces the handlers of SIGTERM when it starts, in C++ too;
`handlers_kept` puts back those that were there before.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

_ENDING = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """The process was sent SIGTERM. Whatever handles Ctrl-C handles it, too."""


def exit_code(interruption: KeyboardInterrupt) -> int:
    """What a shell reports for a process that the signal has ended: 130 for SIGINT, 143 for
    SIGTERM.
    """
    return 128 + (signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the context, the first SIGINT raises KeyboardInterrupt and the first SIGTERM raises
    Terminated.

    What comes next is the orderly end, which takes seconds: a second Ctrl-C ends the process at
    once, and SIGTERM, which some schedulers send repeatedly, is ignored. Changes nothing outside
    the main thread.
    """
    with handlers_kept():
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                signal.signal(number, _interrupt)
        yield


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Put the handlers of SIGINT and SIGTERM back at the end."""
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in _ENDING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
