"""Ctrl-C and SIGTERM as exceptions of the main thread, whatever the process inherited and whatever
Ray installs.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from pipeline.utils.signals import Terminated, exit_code, handlers_kept, interruptible


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, Terminated, 143)],
)
def test_a_signal_raises_once_and_the_former_handlers_come_back(
    number: signal.Signals, kind: type[KeyboardInterrupt], code: int
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with interruptible():
        with pytest.raises(KeyboardInterrupt) as raised:
            signal.raise_signal(number)
        assert (type(raised.value), exit_code(raised.value)) == (kind, code)
        signal.raise_signal(signal.SIGTERM)  # while the orderly end is under way
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_handlers_installed_meanwhile_are_replaced_by_the_former_ones() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with handlers_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_may_enter() -> None:
    entered = []

    def enter() -> None:
        with interruptible():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]


def test_sigint_interrupts_where_it_was_inherited_as_ignored() -> None:
    program = (
        "import signal, pipeline.utils.signals as s\nwith s.interruptible():"
        " signal.raise_signal(signal.SIGINT)\nprint('went on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == ""
    assert "KeyboardInterrupt" in done.stderr
