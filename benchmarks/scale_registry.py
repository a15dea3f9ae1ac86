"""What a registry costs, embedded and through a server: wall time of registrations and look-ups,
and the processor time of registrations in the process that asks.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from machine import free_port
from scale_driver import median_seconds

from pipeline.registry.pack_record import Champion
from pipeline.registry.store import Registry, open_registry

SERVER_SECONDS = 300


def registry_costs(workdir: Path, repeats: int = 15) -> dict[str, float]:
    """Wall time of one registration, its processor time here, and wall time of one look-up by
    numbers, in the embedded registry and through a server on this machine.
    """
    pack = workdir / "pack.safetensors"
    pack.write_bytes(os.urandom(48 * 1024))
    costs: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        for name, uri in (
            ("embedded", None),
            ("server", stack.enter_context(mlflow_server(workdir / "server"))),
        ):
            found = _register_and_search(open_registry(uri, workdir / name), pack, repeats)
            costs |= {f"{name}_{what}": seconds for what, seconds in found.items()}
    return costs


def _register_and_search(registry: Registry, pack: Path, repeats: int) -> dict[str, float]:
    champions = iter([champion(number, pack) for number in range(repeats + 1)])
    registry.register(next(champions))  # what is made once is made now
    wall, ours = list[float](), list[float]()
    for given in champions:
        before = time.perf_counter(), time.process_time()
        registry.register(given)
        wall.append(time.perf_counter() - before[0])
        ours.append(time.process_time() - before[1])
    search = median_seconds(
        lambda: registry.search(max_bytes=64 * 1024, limit=10), clock=time.perf_counter
    )
    return {
        "register": statistics.median(wall),
        "register_driver": statistics.median(ours),
        "search": search,
    }


def champion(number: int, pack: Path) -> Champion:
    """The champion of a new task, with the rows of sixteen trials."""
    size_bytes = pack.stat().st_size
    rows = [
        {
            "id": f"{row}",
            "val_metric": 0.5,
            "size_bytes": size_bytes,
            "state": "complete",
            "point": {"bits": 4},
        }
        for row in range(16)
    ]
    return Champion(
        task=f"task{number:04d}",
        pack_path=pack,
        pack_digest=f"{number:064x}",
        size_bytes=size_bytes,
        ledger={"values": size_bytes},
        metrics={
            "test_metric": 0.5,
            "test_metric_stderr": 0.01,
            "val_metric": 0.5,
            "trained_values": 1.0,
        },
        params={f"part.key{key}": "1" for key in range(20)},
        tags={"backbone": "vit", "description": "a task"},
        front=rows,
    )


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A tracking server of this process alone, on the loopback interface."""
    folder.mkdir(parents=True)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{uri}/health", timeout=5).close()
                break
            time.sleep(0.5)
        yield uri
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait()
