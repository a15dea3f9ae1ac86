"""A thousand tasks on a hundred GPUs, on paper: what each operation of the driver, the registry and
the work folder costs, and where each saturates.

    python benchmarks/scale.py [--tasks 1000] [--trials 16] [--gpus 100] [--again task] [--workdir
    runs/benchmarks/scale]

The costs are measured here, on this machine: as processor time where the driver computes, as bytes
where files are written, as wall time where a database or a server answers. `scale_simulation.py`
then plays a batch with them. Writes benchmarks/results/scale.json and scale.md, and the tables of
docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from scale_driver import study_costs, task_costs, watch_costs
from scale_page import markdown, write_document
from scale_registry import registry_costs
from scale_simulation import Costs, Plan, simulate

from pipeline.driver.stages import SLACK
from pipeline.search.proposer import LAG, places_of

PARTS = ("watch", "study", "task", "registry")
RESULTS = Path(__file__).parent / "results" / "scale.json"


def costs_of(measured: dict[str, Any]) -> Costs:
    """The measurements as the simulation takes them: seconds of the driver, and of the registry."""
    study, task, watch = measured["study"], measured["task"]["seconds"], measured["watch"]
    return Costs(
        result=max(study["result"], 0.0),
        trial=max(study["trial"], 0.0),
        study=max(study["study"], 0.0) + task["open"] + task["plan"] + task["selection_read"],
        study_end=measured["registry"]["server_register_driver"],  # a worker draws its figure
        silent_share=max(study["silent_second"], 0.0),
        state_share=watch["state_write"],
        registration=measured["registry"]["server_register"],
        coding=task["code"] + task["list"],
    )


def scenarios(costs: Costs, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Batches that differ in how long a trial takes on its GPU, and in whether studies sample their
    spaces or enumerate them; and one task alone on eight GPUs.
    """
    many, trials = (arguments.tasks, arguments.gpus), arguments.trials
    return [
        simulate(
            Plan(
                tasks=tasks,
                trials=trials,
                gpus=gpus,
                studies=min(tasks, studies_that_fill(gpus, trials)),
                trial_seconds=trial_seconds,
                learns=learns,
            ),
            costs,
        )
        for (tasks, gpus), learns, trial_seconds in (
            (many, True, 30),
            (many, True, 100),
            (many, True, 300),
            (many, False, 30),
            (many, False, 100),
            (many, False, 300),
            ((1, 8), True, 300),
            ((1, 8), False, 300),
        )
    ]


def limits(
    costs: Costs, measured: dict[str, Any], arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """How much each part can take, beside what the plan asks of it with trials of 300 s and 30
    epochs.
    """
    trial_seconds = 300
    hours = arguments.tasks * (arguments.trials * trial_seconds) / arguments.gpus / 3600
    sizes = measured["task"]["bytes"]
    rows = [
        *_driver_limits(costs, arguments, Plan.epochs / trial_seconds),
        *_registry_limits(measured["registry"], arguments.tasks / hours),
        *_memory_limits(sizes, arguments),
        *_folder_limits(sizes, arguments.tasks, arguments.trials, hours),
    ]
    return [{"part": part, "asked": asked, "limit": limit} for part, asked, limit in rows]


Limit = tuple[str, str, str]  # of what, what is asked of it, what it can take


def _driver_limits(
    costs: Costs, arguments: argparse.Namespace, results_per_gpu_second: float
) -> list[Limit]:
    gpus, filling = arguments.gpus, studies_that_fill(arguments.gpus, arguments.trials)
    idle = 1 - filling * costs.silent_share - costs.state_share
    return [
        (
            "driver: results a second",
            f"{gpus * results_per_gpu_second:.0f}",
            f"{idle / costs.result:,.0f}" if idle > 0 else "none: polling takes all",
        ),
        (
            "driver: studies it can follow at once",
            f"{filling}",
            f"{(1 - costs.state_share) / costs.silent_share:,.0f}",
        ),
    ]


def _registry_limits(seconds: dict[str, float], packs_per_hour: float) -> list[Limit]:
    return [
        (
            f"registry: registrations an hour, {name}",
            f"{packs_per_hour:.0f}",
            f"{3600 / seconds[f'{name}_register']:,.0f}",
        )
        for name in ("server", "embedded")
    ]


def _memory_limits(sizes: dict[str, int], arguments: argparse.Namespace) -> list[Limit]:
    studies = studies_that_fill(arguments.gpus, arguments.trials)
    alive = studies * LAG * sizes["arguments"]
    return [
        (
            "object store: bytes of arguments alive",
            f"{alive / 1024:,.0f} KiB",
            "GiB on every node",
        ),
        (
            "backbone: bytes a node, mapped once",
            f"{sizes['backbone'] / 2**20:,.0f} MiB",
            "a node's memory",
        ),
    ]


def _folder_limits(sizes: dict[str, int], tasks: int, trials: int, hours: float) -> list[Limit]:
    files = tasks * (trials + 5)
    written = tasks * (
        sizes["selection"] + sizes["pack"] + sizes["figure"] + trials * sizes["record"]
    )
    read = tasks * (LAG + 1) * (sizes["shards"] + sizes["selection"])
    return [
        (
            "work folder: written in all, data apart",
            f"{written / 2**30:,.1f} GiB in {files:,} files",
            "the file system",
        ),
        (
            "work folder: read by workers, on average",
            f"{read / (hours * 3600) / 2**20:,.1f} MiB/s",
            "the file system",
        ),
    ]


def studies_that_fill(gpus: int, trials: int) -> int:
    """How many studies the driver runs at once on so many GPUs."""
    return 1 + math.ceil(gpus * SLACK / places_of(trials))


def main() -> None:
    """Measure, simulate, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=100)
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks/scale"))
    parser.add_argument(
        "--again", choices=PARTS, nargs="*", help="of the results: measure these, or nothing"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(arguments.workdir, ignore_errors=True)
    workdir = arguments.workdir.resolve()
    workdir.mkdir(parents=True)
    before = {} if arguments.again is None else json.loads(RESULTS.read_text())
    chosen = PARTS if arguments.again is None else arguments.again
    machine = describe_machine()
    measured = {
        part: measure(workdir) if part in chosen else before["measured"][part]
        for part, measure in measures(arguments.tasks).items()
    }
    again = dict.fromkeys(arguments.again or (), machine["commit"])
    kept = {
        "machine": before.get("machine", machine),
        "again": {**before.get("again", {}), **again},
    }
    finish(measured, kept, arguments)


def measures(tasks: int) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """What measures each part of the costs in a folder."""
    return {
        "watch": lambda workdir: watch_costs(workdir, tasks),
        "study": study_costs,
        "task": task_costs,
        "registry": registry_costs,
    }


def finish(measured: dict[str, Any], origin: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Simulate, and write all that is written; `origin` is on what it was measured."""
    costs = costs_of(measured)
    result = {
        **origin,
        "tasks": arguments.tasks,
        "trials": arguments.trials,
        "gpus": arguments.gpus,
        "measured": measured,
        "limits": limits(costs, measured, arguments),
        "simulated": scenarios(costs, arguments),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))
    write_document(result)
    print(markdown(result))


if __name__ == "__main__":
    main()
