"""The server under load: how long requests take, and how many are answered in a second, while they
ask for 1, 16 and 256 tasks; and what clients see when a replica is killed and when a task gets
another champion.

    python benchmarks/server.py [--tasks 1 16 256] [--requests 600] [--clients 8]

Registers packs with random values on the embedded backbone in a registry of its own, starts
`taskpack serve` on this machine, and sends requests over the loopback interface: each client keeps
one connection and asks for one image of one task at a time, tasks in random order. The packs are
loaded before the clock starts. The clients share the machine's cores with the server. For the two
events, two replicas serve 16 tasks; every answer is compared with the first one for its task.
Writes `results/server.json` and `.md`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, free_port
from pages import table
from runs import SHARED
from server_events import MARK, Clients, kill_a_replica, move_an_alias, png
from serving import RECIPES, backbones, draw_pack, register

from pipeline.backbones import load_backbone
from pipeline.registry.store import open_registry

RESULTS = Path(__file__).parent / "results"
RECIPE = "connections K = 1, biases, bank, norms"
PACKS = 16
"""Distinct packs; more tasks than that share their files."""


def main() -> None:
    arguments = _arguments()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        names = [f"task{number}" for number in range(max(arguments.tasks))]
        _register(workdir, names)
        with _serving(workdir, names[0]) as port:
            for tasks in arguments.tasks:
                asked = names[:tasks]
                _load(port, arguments.clients, asked)
                rows.append(_measured(port, asked, arguments.clients, arguments.requests))
        with (
            _serving(workdir, names[0], "--replicas", "2", "--cpus", "0.5") as port,
            Clients(port, names[:PACKS], arguments.clients) as clients,
        ):
            clients.warm_up()
            killed = kill_a_replica(clients, workdir)
            moved = move_an_alias(clients, workdir, names[0])
    result = {
        "machine": describe_machine(),
        "recipe": RECIPE,
        "clients": arguments.clients,
        "requests": arguments.requests,
        "rows": rows,
        "killed": killed,
        "moved": moved,
    }
    (RESULTS / "server.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "server.md").write_text(_page(result))


def _register(workdir: Path, names: list[str]) -> None:
    """A registry in the work folder with a pack for each name."""
    spec, image_input = backbones(SHARED)["embedded"]
    backbone = load_backbone(spec, image_input)
    contents = [draw_pack(backbone, RECIPES[RECIPE], seed) for seed in range(PACKS)]
    registry = open_registry(f"sqlite:///{workdir}/mlflow.db", workdir)
    for number, name in enumerate(names):
        register(registry, workdir, name, contents[number % PACKS])


@contextlib.contextmanager
def _serving(workdir: Path, task: str, *options: str) -> Iterator[int]:
    """A context in which `taskpack serve` answers on a port."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("taskpack")), "serve", task]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--workdir", str(workdir), "--device", "cpu", *options],
        env={
            **{name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"},
            MARK: str(workdir),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving at")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


def _measured(port: int, names: list[str], clients: int, requests: int) -> dict[str, Any]:
    """Latencies and requests per second, with tasks in random order."""
    order = random.Random(0).choices(names, k=requests)
    began = time.perf_counter()
    latencies = _load(port, clients, order)
    seconds = time.perf_counter() - began
    p50, p99 = np.percentile(latencies, [50, 99])
    return {"tasks": len(names), "p50": p50, "p99": p99, "per_second": requests / seconds}


def _load(port: int, clients: int, order: list[str]) -> list[float]:
    """The latency of a request for each of the names in `order`, which the clients share."""
    shares = [order[client::clients] for client in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda share: _ask(port, share), shares))
    return [latency for latencies in found for latency in latencies]


def _ask(port: int, names: list[str]) -> list[float]:
    """Requests on one connection, one after another."""
    body = json.dumps({"image": base64.b64encode(png()).decode()})
    connection, latencies = http.client.HTTPConnection("127.0.0.1", port, timeout=120), []
    for name in names:
        began = time.perf_counter()
        connection.request(
            "POST", f"/v1/tasks/{name}:predict", body, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        content = response.read()
        assert response.status == 200, content
        latencies.append(time.perf_counter() - began)
    connection.close()
    return latencies


def _page(result: dict[str, Any]) -> str:
    machine = result["machine"]
    rows = (
        (
            row["tasks"],
            f"{row['per_second']:.1f}",
            f"{1000 * row['p50']:.0f}",
            f"{1000 * row['p99']:.0f}",
        )
        for row in result["rows"]
    )
    about = (
        f"{machine['cpu']}, {machine['cores']} cores, commit {machine['commit']}. One replica of"
        f" one CPU, the embedded backbone at 64 px, packs of {result['recipe']}."
        f" {result['clients']} clients, which share the cores with the server, send"
        f" {result['requests']} requests of one image for tasks in random order. All packs are in"
        " memory."
    )
    lines = [
        "# The server under load",
        "",
        *textwrap.wrap(about, 100),
        "",
        *table(("tasks", "requests per second", "p50, ms", "p99, ms"), rows),
        "",
        f"## Two replicas, {PACKS} tasks",
        "",
        *table(
            ("event", "answers", "wrong", "failed", "of what", "seconds"),
            [
                _event("a replica is killed", "until another runs", result["killed"]),
                _event("a task gets another champion", "until it answers", result["moved"]),
            ],
        ),
        "",
        "Command: `python benchmarks/server.py`",
    ]
    return "\n".join(lines) + "\n"


def _event(name: str, until: str, row: dict[str, Any]) -> tuple[Any, ...]:
    errors = "; ".join(  # each after the server's address
        f"{text.partition(': ')[2]} ({count})" for text, count in row["errors"].items()
    )
    failed = sum(row["errors"].values())
    return name, row["answers"], row["wrong"], failed, errors, f"{row['seconds']:.1f} {until}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--clients", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
