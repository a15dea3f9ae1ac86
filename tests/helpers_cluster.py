"""A Ray cluster of several nodes on this machine, whose workers note what they begin and can be
held there; the command run on it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import Answer, environment
from helpers_forks import ForkedCommand
from helpers_paths import TESTS

WAIT_SECONDS = 600
"""Only for what hangs: with other tests beside it on two cores, a run on several nodes takes
minutes.
"""
HOOKS = TESTS / "hooks"


@dataclass
class TestCluster:
    """A head without CPUs, where commands connect, and nodes of one CPU each. `notes` is the folder
    of `hooks/sitecustomize.py`.
    """

    __test__ = False

    cluster: Any
    notes: Path
    options: dict[str, Any]
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add_node(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, **self.options))

    def lose_node_of(self, process: int) -> None:
        """Kill the node that a worker process belongs to, without warning, and everything on it;
        another takes its place.
        """
        (node,) = [
            node
            for node in self.nodes
            if node.all_processes["raylet"][0].process.pid == parent(process)
        ]
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.add_node()

    def lose_head(self) -> None:
        """Kill the head without warning. The cluster is lost with it."""
        self.cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)

    def begun(self, kind: str) -> list[int]:
        """The process of each beginning of a kind, in order."""
        path = self.notes / "begun"
        lines = path.read_text().splitlines() if path.exists() else []
        return [int(line.split()[0]) for line in lines if line.endswith(f" {kind}")]

    def forget(self) -> None:
        (self.notes / "begun").unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self, kind: str) -> Iterator[None]:
        """What begins of this kind does not go on meanwhile."""
        gate = self.notes / f"hold-{kind}"
        gate.touch()
        try:
            yield
        finally:
            gate.unlink()

    def counts(self) -> dict[str, int]:
        """How often each kind has begun."""
        return {kind: len(self.begun(kind)) for kind in ("select", "trial", "fit")}

    def wait_for(self, kind: str, count: int, command: Command) -> int:
        """The process of the `count`-th beginning."""
        wait_until(
            lambda: (
                len(self.begun(kind)) >= count
                or command.process.poll() is not None
                or ": failed" in command.said()
            )
        )
        assert len(self.begun(kind)) >= count, (
            f"no {kind} number {count} has begun: {self.counts()} {command.said()}"
        )
        return self.begun(kind)[count - 1]


@contextlib.contextmanager
def test_cluster(folder: Path, nodes: int, **options: Any) -> Iterator[TestCluster]:
    """A cluster whose nodes are ended at the end; `options` are of each node. A node's death is
    noticed within seconds.
    """
    from ray.cluster_utils import Cluster

    folder.mkdir(parents=True, exist_ok=True)
    changes = {
        "PYTHONPATH": os.pathsep.join([str(HOOKS), str(HOOKS.parent.parent)]),
        "TASKPACK_TEST_NOTES": str(folder),
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "8",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setenv(name, value)
        arguments = {
            "num_cpus": 0,
            "include_dashboard": False,
            "temp_dir": os.path.join(tempfile.gettempdir(), "ray"),
        }
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        try:
            made = TestCluster(cluster, folder, options)
            for _ in range(nodes):
                made.add_node()
            yield made
        finally:
            cluster.shutdown()


test_cluster.__test__ = False  # type: ignore[attr-defined]


@dataclass
class Command:
    """`taskpack run` in a process of its own."""

    process: ForkedCommand
    out: Path
    err: Path

    def said(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def kill(self) -> None:
        """As a machine does that goes down."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> Answer:
        """Wait for its end."""
        try:
            code = self.process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the command has not ended after {WAIT_SECONDS} s: {self.said()}")
        return Answer(code, self.out.read_text(), self.err.read_text())


def start(folder: Path, *arguments: str | Path, **changes: str) -> Command:
    """Start the command; `changes` are of its environment."""
    folder.mkdir(parents=True, exist_ok=True)
    out, err = folder / "out", folder / "err"
    process = ForkedCommand(arguments, environment=environment(**changes), stdout=out, stderr=err)
    return Command(process, out, err)


def wait_until(holds: Callable[[], bool], seconds: float = WAIT_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def parent(process: int) -> int:
    """The process that has started this one."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def title(process: int) -> str:
    """What a process calls itself; Ray names its workers after what they run."""
    return Path(f"/proc/{process}/cmdline").read_text().partition("\0")[0].strip()


def written(workdir: Path) -> dict[Path, int]:
    """The finished results and when each was written."""
    patterns = (
        "data/*/*",
        "selections/*.safetensors",
        "studies/*/trials/*.json",
        "studies/*/fits/*/pack.safetensors",
    )
    return {
        path.relative_to(workdir): path.stat().st_mtime_ns
        for pattern in patterns
        for path in workdir.glob(pattern)
    }


def results(workdir: Path) -> dict[str, bytes]:
    """Selections and packs, by path."""
    patterns = ("selections/*.safetensors", "studies/*/fits/*/pack.safetensors")
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for pattern in patterns
        for path in workdir.glob(pattern)
    }


def stages_of(out: str) -> Counter[str]:
    """How often each task entered each stage, as its log says."""
    return Counter(
        line.partition("] ")[2].partition(" - ")[0]
        for line in out.splitlines()
        if line.startswith("[")
    )
