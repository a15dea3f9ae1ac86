"""Does a batch of many tasks come to its end while its workers are killed, and does its driver stay
small?

    python benchmarks/soak.py [--tasks 100] [--kill-seconds 20] [--minutes 600] [--workdir
    runs/benchmarks/soak]

Tiny drawn tasks on a random ViT of width 64 and depth 2, two trials of two epochs each, as one
`taskpack run` on a private Ray with two CPUs. Every `--kill-seconds` one of that Ray's workers is
killed: the first found at work, for such tasks take a worker longer to start than to do. At the end
every task must have exactly one registered pack, and the driver's memory must not have grown. A run
that takes longer than `--minutes` is interrupted, as by Ctrl-C, and the same is asked of the tasks
that have ended. A fit must be able to start and end between two kills: on a machine that is busy
with other work, kill less often. Writes benchmarks/results/soak.json, soak.md and soak.png.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from machine import describe_machine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.driver.monitor.state import ENDED, read_state
from pipeline.registry.store import open_registry

RESULTS = Path(__file__).parent / "results" / "soak.json"
SAMPLE_SECONDS = 1.0
HUNT_SECONDS = 0.1
"""How often it is looked for a worker at work, once one is to be killed."""
MAX_GROWTH = 0.10
"""Largest share by which the driver's memory over the last quarter of the tasks may exceed that
over the second quarter.
"""
BACKBONE = {
    "model": "vit_tiny_patch16_224",
    "arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    "weights": "random",
}


@dataclass
class Soak:
    """What was seen of a run. `samples`: seconds, the driver's resident bytes, and tasks that have
    ended; `kills`: seconds and what was killed.
    """

    samples: list[tuple[float, int, int]] = field(default_factory=list)
    kills: list[tuple[float, str]] = field(default_factory=list)
    seconds: float = 0.0


def write_tasks(folder: Path, count: int) -> None:
    """Task files of `count` tasks that differ in seed and so in their images, on one backbone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "backbone.yaml").write_text(yaml.safe_dump(BACKBONE))
    for number in range(count):
        task: dict[str, Any] = {
            "name": f"bars{number:03d}",
            "data": {
                "format": "drawn",
                "kind": "orientation",
                "train_samples": 48,
                "test_samples": 24,
            },
            "input": {"size_px": 32, "flip": False},
            "backbone": "backbone.yaml",
            "recipe": {
                "connections": {"top_k": 1},
                "training": {"epochs": 2, "batch_size": 16, "precision": "fp32"},
            },
            "search": {"bits": [4, 8]},
            "selection": {"batch_size": 16},
            "seed": number,
        }
        (folder / f"{task['name']}.yaml").write_text(yaml.safe_dump(task))


def workers_of(driver: psutil.Process) -> dict[int, str]:
    """What the Ray workers below the driver are doing, by process id; Ray names a process after it.
    Without a node's agents, no node lives.
    """
    found = {}
    for process in driver.children(recursive=True):
        try:
            name = (process.cmdline() or [""])[0]
        except psutil.Error:
            continue
        if name.startswith("ray::") and not name.endswith(("Agent", "IDLE")):
            found[process.pid] = name.removeprefix("ray::").split(" ")[0]
    return found


def kill_one(driver: psutil.Process, draw: random.Random) -> str | None:
    """Kill a worker at work, if there is one; what it was doing."""
    workers = workers_of(driver)
    if not workers:
        return None
    pid = draw.choice(sorted(workers))
    try:
        psutil.Process(pid).kill()
    except psutil.Error:
        return None
    return workers[pid]


def watch_run(tasks: Path, workdir: Path, kill_seconds: float, limit_seconds: float) -> Soak:
    """Run the batch to its end, or for `limit_seconds`, killing workers and looking at the driver's
    memory.
    """
    seen, draw = Soak(), random.Random(0)
    command = [
        sys.executable,
        "-m",
        "pipeline.cli.app",
        "run",
        str(tasks),
        "--workdir",
        str(workdir),
        "--json",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    }
    with (
        (workdir / "output.json").open("w") as out,
        (workdir / "messages.txt").open("w") as messages,
    ):
        process = subprocess.Popen(command, stdout=out, stderr=messages, env=environment)
        started, next_kill = time.monotonic(), kill_seconds
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            now = time.monotonic() - started
            if not seen.samples or now >= seen.samples[-1][0] + SAMPLE_SECONDS:
                state = read_state(workdir)
                ended = sum(task.stage in ENDED for task in state.tasks) if state is not None else 0
                seen.samples.append((round(now, 1), driver.memory_info().rss, ended))
            if now >= limit_seconds:
                process.send_signal(signal.SIGINT)
                process.wait()
            elif now >= next_kill and (name := kill_one(driver, draw)) is not None:
                seen.kills.append((round(now, 1), name))
                next_kill = now + kill_seconds
            time.sleep(HUNT_SECONDS if now >= next_kill else SAMPLE_SECONDS)
        seen.seconds = round(time.monotonic() - started, 1)
    return seen


def memory_row(samples: list[tuple[float, int, int]]) -> dict[str, float]:
    """The driver's memory over the second and the last quarter of the tasks, in bytes, and the
    slope over the last three quarters of them.
    """
    tasks = samples[-1][2]
    rss_N, ended_N = (
        np.array([rss for _, rss, _ in samples]),
        np.array([ended for _, _, ended in samples]),
    )
    second = rss_N[(ended_N >= tasks / 4) & (ended_N < tasks / 2)]
    last = rss_N[ended_N >= tasks * 3 / 4]
    late = ended_N >= tasks / 4
    slope = float(np.polyfit(ended_N[late], rss_N[late], 1)[0])
    growth = float(np.median(last) / np.median(second)) - 1
    return {
        "second_quarter_bytes": float(np.median(second)),
        "last_quarter_bytes": float(np.median(last)),
        "growth": growth,
        "bytes_a_task": slope,
    }


def check_packs(workdir: Path, tasks: int, *, interrupted: bool) -> dict[str, int]:
    """One pack a task that has ended, no more, and no task that failed. Raises AssertionError that
    says what is wrong.
    """
    packs = open_registry(None, workdir).search(limit=10 * tasks)
    versions = Counter(pack.name for pack in packs)
    state = read_state(workdir)
    assert state is not None
    done = {task.task for task in state.tasks if task.stage == "done"}
    assert "failed" not in state.stages, f"tasks failed: see {workdir / 'messages.txt'}"
    assert interrupted or len(done) == tasks, state.stages
    assert done <= versions.keys(), (
        f"done without a registered pack: {sorted(done - versions.keys())}"
    )
    assert set(versions.values()) == {1}, (
        f"registered more than once: {[name for name, count in versions.items() if count > 1]}"
    )
    assert all(pack.version == 1 for pack in packs), "a version was registered and lost"
    return {"done": len(done), "registered": len(packs)}


def draw_memory(seen: Soak, path: Path) -> None:
    """The driver's memory and the tasks that have ended, over time; ticks are kills."""
    figure = Figure(figsize=(7.6, 4.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    minutes = [seconds / 60 for seconds, _, _ in seen.samples]
    upper.plot(minutes, [rss / 2**20 for _, rss, _ in seen.samples], color="#0072B2")
    upper.set_ylim(bottom=0)
    upper.set_ylabel("driver, MiB resident")
    lower.plot(minutes, [ended for _, _, ended in seen.samples], color="#222222")
    kills = [seconds / 60 for seconds, _ in seen.kills]
    lower.plot(kills, [0] * len(kills), "|", color="#D55E00", label=f"{len(kills)} workers killed")
    lower.legend(loc="upper left", frameon=False)
    lower.set_ylabel("tasks ended")
    lower.set_xlabel("minutes")
    canvas.print_png(path, metadata={"Software": None})


def markdown(result: dict[str, Any]) -> str:
    """The numbers as a page."""
    machine, memory = result["machine"], result["memory"]
    kills = ", ".join(f"{count} {name}" for name, count in result["kills_by_name"].items())
    rows = {
        "tasks": result["tasks"],
        "tasks done"
        + (", then the run was interrupted" if result["done"] < result["tasks"] else ""): result[
            "done"
        ],
        "registered packs, each once": result["registered"],
        "minutes": f"{result['seconds'] / 60:.1f}",
        "workers killed": result["kills"],
        "driver, second quarter of the tasks": f"{memory['second_quarter_bytes'] / 2**20:.0f} MiB",
        "driver, last quarter": f"{memory['last_quarter_bytes'] / 2**20:.0f} MiB",
        "growth between them": f"{memory['growth']:.1%}",
        "slope over the last three quarters": f"{memory['bytes_a_task'] / 1024:.0f} KiB a task",
    }
    return "\n".join(
        [
            "# Soak",
            "",
            (
                f"{machine['cpu']}, {machine['cores']} cores shared with other work; torch"
                f" {machine['torch']}; commit {machine['commit']}."
            ),
            "",
            (
                "One batch of tiny tasks, two trials of two epochs each, a worker at work killed"
                f" every {result['kill_seconds']:g} s: {kills or 'none was killed'}."
            ),
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "![The driver's memory over time](soak.png)",
            "",
        ]
    )


def main() -> None:
    """Run, check, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--kill-seconds", type=float, default=20.0)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks/soak"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.workdir, ignore_errors=True)
    workdir = (arguments.workdir / "work").resolve()
    workdir.mkdir(parents=True)
    write_tasks(arguments.workdir / "tasks", arguments.tasks)
    seen = watch_run(
        arguments.workdir / "tasks", workdir, arguments.kill_seconds, 60 * arguments.minutes
    )
    registered = check_packs(
        workdir, arguments.tasks, interrupted=seen.seconds >= 60 * arguments.minutes
    )
    memory = memory_row(seen.samples)
    result = {
        "machine": describe_machine(),
        "tasks": arguments.tasks,
        "kill_seconds": arguments.kill_seconds,
        "seconds": seen.seconds,
        "kills": len(seen.kills),
        "kills_by_name": dict(Counter(name for _, name in seen.kills).most_common()),
        "memory": memory,
        **registered,
        "samples": seen.samples,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result) + "\n")
    arguments.out.with_suffix(".md").write_text(markdown(result))
    draw_memory(seen, arguments.out.with_suffix(".png"))
    print(markdown(result))
    assert memory["growth"] <= MAX_GROWTH, f"the driver grew by {memory['growth']:.1%}"


if __name__ == "__main__":
    main()
