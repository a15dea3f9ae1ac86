"""The command in a process of its own that is forked from one where everything is imported: the
imports take longer than most of what these tests run.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

PRELOADED = (
    "pipeline.cli.app",
    "pipeline.api",
    "pipeline.driver.batch",
    "pipeline.search.tune",
    "mlflow",
    "ray.train.torch",
    "ray.tune",
)


class ForkedCommand:
    """`taskpack` with these arguments, started; it has the methods of `subprocess.Popen`.

    Args:
        environment: the whole environment of the process.
        ignores_sigint: start it as shells start jobs in the background.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        stdout: Path,
        stderr: Path,
        ignores_sigint: bool = False,
    ) -> None:
        stdout.touch()
        stderr.touch()
        self._process: ForkServerProcess = _server().Process(
            target=_run,
            args=([*map(str, arguments)], dict(environment), str(stdout), str(stderr)),
            kwargs={"ignores_sigint": ignores_sigint},
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("taskpack", timeout or 0.0)
        return code

    def send_signal(self, how: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, how)


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _run(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    stdout: str,
    stderr: str,
    *,
    ignores_sigint: bool,
) -> None:
    """What the installed command does, in a process that has just been forked."""
    from pipeline.cli import app

    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignores_sigint else signal.default_int_handler)
    for stream, path in ((sys.stdin, os.devnull), (sys.stdout, stdout), (sys.stderr, stderr)):
        number = 0 if stream is sys.stdin else stream.fileno()
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["taskpack", *arguments]
    try:
        app.main()
    finally:
        atexit._run_exitfuncs()
