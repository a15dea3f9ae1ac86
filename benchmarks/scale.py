"""A thousand tasks on a hundred GPUs, on paper: what each operation of the driver, the registry and
the work folder costs, and where each saturates.

    python benchmarks/scale.py [--tasks 1000] [--trials 16] [--gpus 100] [--workdir
    runs/benchmarks/scale]

The costs are measured here, on this machine: as processor time where the driver computes, as bytes
where files are written, as wall time where a database or a server answers. `scale_simulation.py`
then plays a batch with them. Writes benchmarks/results/scale.json and scale.md, and the tables of
docs/scale.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import describe_machine, free_port
from scale_simulation import Costs, Plan, simulate

from pipeline.adaptation.packing import SizePlanner
from pipeline.adaptation.selected.ranking import rank_places
from pipeline.adaptation.sites import weight_shapes
from pipeline.backbones import load_backbone, share
from pipeline.cluster.session import ray_session
from pipeline.data import prepare
from pipeline.data.index import read_index
from pipeline.driver.monitor.batch_watch import BatchWatch
from pipeline.driver.stages import no_progress
from pipeline.registry.pack_record import Champion
from pipeline.registry.store import Registry, open_registry
from pipeline.reports.front_figure import draw_front
from pipeline.search.proposer import LAG, make_proposer
from pipeline.search.run_study import run_study
from pipeline.search.trial_record import TrialJournal, TrialRecord
from pipeline.selection import read_selection
from pipeline.selection.stage import write_selection
from pipeline.specs import Backbone, Input, Task
from pipeline.training import open_inputs
from pipeline.training.fit import FitResult

RESULTS = Path(__file__).parent / "results" / "scale.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "scale.md"
SERVER_SECONDS = 300
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
VIT_B = Backbone(model="vit_base_patch16_224", weights="random")


def median_seconds(
    action: Callable[[], object], repeats: int = 5, clock: Callable[[], float] = time.process_time
) -> float:
    """Median time of `action`: of this process on a processor, or by another clock."""
    taken = []
    for _ in range(repeats):
        started = clock()
        action()
        taken.append(clock() - started)
    return median(taken)


# --- Tune and the study ---------------------------------------------------------------------------


def tiny_task(name: str, epochs: int, trials: int, train_samples: int) -> Task:
    """A linear probe on drawn images, of which nothing but the driver's part matters."""
    return Task.model_validate(
        {
            "name": name,
            "data": {
                "format": "drawn",
                "kind": "orientation",
                "train_samples": train_samples,
                "test_samples": 24,
            },
            "input": {"size_px": 32, "flip": False},
            "backbone": {"model": "vit_tiny_patch16_224", "arguments": TINY, "weights": "random"},
            "recipe": {
                "connections": None,
                "training": {"epochs": epochs, "batch_size": 16, "precision": "fp32"},
            },
            "search": {
                "head_bits": [1, 2, 4, 8],
                "learning_rate": [0.001 * (1 + step) for step in range(trials // 4)],
                "trials": trials,
            },
        }
    )


@dataclass(frozen=True)
class StudyRun:
    """What a study asked of its driver."""

    trials: int
    results: int
    processor_seconds: float
    wall_seconds: float


def run_one_study(task: Task, workdir: Path) -> StudyRun:
    """As a batch runs it, with its watch; needs a running Ray."""
    data = workdir / "data" / task.name
    data.parent.mkdir(parents=True, exist_ok=True)
    prepare(task, data)
    inputs = open_inputs(task, data)
    planner = SizePlanner(task, inputs.backbone, inputs.index.classes)
    journal = TrialJournal(workdir / "studies" / task.name)
    with BatchWatch(workdir / task.name, "scale", [task.name], on_progress=no_progress) as watch:
        started, wall = time.process_time(), time.perf_counter()
        records = run_study(
            task,
            data,
            None,
            journal,
            size_of=planner.size_bytes,
            on_progress=lambda study: watch.study(study, samples=1, fit_samples=1),
        )
        taken = time.process_time() - started, time.perf_counter() - wall
    return StudyRun(len(records), sum(len(record.curve) for record in records), *taken)


def study_costs(workdir: Path) -> dict[str, Any]:
    """Processor time of the driver: of a study, a trial, a result, and a second in which nothing
    comes.

    Four unknowns from studies that differ in one each: few and many results, few and many trials,
    short and long epochs.
    """
    tasks = [
        tiny_task("warm", 1, 4, 64),
        tiny_task("plain", 1, 4, 64),
        tiny_task("results", 60, 4, 64),
        tiny_task("trials", 1, 16, 64),
        tiny_task("silent", 1, 4, 6_000),
    ]
    with ray_session():
        runs = [run_one_study(task, workdir) for task in tasks][1:]
    counts = np.array([[1, run.trials, run.results, run.wall_seconds] for run in runs])
    study, trial, result, second = np.linalg.solve(
        counts, np.array([run.processor_seconds for run in runs])
    )
    return {
        "study": study,
        "trial": trial,
        "result": result,
        "silent_second": second,
        "runs": [run.__dict__ for run in runs],
    }


# --- what the driver does for a task beside its study ---------------------------------------------


def records_of(task: Task, size_bytes: int) -> list[TrialRecord]:
    """Sixteen finished trials of ten epochs."""
    curve = tuple(np.linspace(0.2, 0.8, 10))
    points = list(task.search.points())
    return [
        TrialRecord(
            id=f"{number:016x}",
            point=points[number],
            size_bytes=size_bytes + number,
            state="complete",
            val_metric=0.8,
            curve=curve,
        )
        for number in range(16)
    ]


def task_costs(workdir: Path) -> dict[str, Any]:
    """Processor time of the driver for a ViT-B task of 1,000 images, and the bytes it leaves."""
    task = Task.model_validate(
        {
            "name": "vit",
            "data": {
                "format": "drawn",
                "kind": "orientation",
                "train_samples": 800,
                "test_samples": 200,
            },
            "input": {"size_px": 224, "flip": False},
            "backbone": VIT_B.model_dump(),
            "search": {
                "bits": [1, 2, 4],
                "experts": [0, 4],
                "top_k": [1, 2, 3],
                "learning_rate": [0.001, 0.003],
                "trials": 16,
            },
            "budget": {"max_bytes": "4MiB"},
        }
    )
    data = workdir / "vit"
    prepare(task, data)
    backbone = load_backbone(task.backbone, Input(size_px=224, flip=False))
    share(backbone, workdir / "vit.safetensors")
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.rand(shape, generator=generator)
        for name, shape in weight_shapes(backbone.model).items()
    }
    write_selection(rank_places(drawn, "neuron", 3), workdir / "selection.safetensors")
    del drawn
    selected = read_selection(workdir / "selection.safetensors")
    inputs = open_inputs(task, data)
    classes = inputs.index.classes

    def plan() -> None:
        planner = SizePlanner(task, backbone, classes, selected)
        proposer = make_proposer(task, planner.size_bytes)
        for _ in range(16):
            proposal = proposer.propose()
            assert proposal is not None
            proposer.tell(
                TrialRecord(
                    id=proposal.id,
                    point=proposal.point,
                    size_bytes=proposal.size_bytes,
                    state="complete",
                    val_metric=0.5,
                )
            )

    def write_records() -> None:
        for record in records:
            journal.write(record)

    recipe = task.search.recipe(
        task.recipe, {"bits": 4, "experts": 4, "top_k": 3, "learning_rate": 0.001}
    )
    size_bytes = SizePlanner(task, backbone, classes, selected).size_bytes(recipe)
    records = records_of(task, size_bytes)
    journal = TrialJournal(workdir / "journal")
    figure = workdir / "front.png"
    costs = {
        "open": median_seconds(lambda: (read_index(data), open_inputs(task, data))),
        "plan": median_seconds(plan, repeats=1),
        "selection_read": median_seconds(lambda: read_selection(workdir / "selection.safetensors")),
        "record_write": median_seconds(write_records) / len(records),
        "front": median_seconds(
            lambda: draw_front(
                [r.row() for r in records],
                figure,
                metric="accuracy",
                title="t",
                max_bytes=65536,
                champion=records[0].id,
            ),
            3,
        ),
    }
    sizes = {
        "backbone": (workdir / "vit.safetensors").stat().st_size,
        "selection": (workdir / "selection.safetensors").stat().st_size,
        "index": (data / "index.json").stat().st_size if (data / "index.json").exists() else 0,
        "shards": sum(path.stat().st_size for path in data.rglob("*.tar")),
        "record": max(path.stat().st_size for path in (workdir / "journal").glob("*.json")),
        "pack": size_bytes,
        "figure": figure.stat().st_size,
        "arguments": len(
            pickle.dumps({"task": task.model_dump_json(), "recipe": recipe.model_dump_json()})
        ),
        "result": len(pickle.dumps({"epoch": 1, "metric": 0.5, "remark": ""})),
        "fit_result": len(pickle.dumps(a_fit(size_bytes))),
    }
    return {"seconds": costs, "bytes": sizes}


def a_fit(size_bytes: int) -> FitResult:
    """As a worker returns it."""
    numbers = {
        "trained_values": 1,
        "test_samples": 1,
        "metric": "accuracy",
        "test_metric": 1.0,
        "test_metric_stderr": 0.0,
        "train_seconds": 1.0,
    }
    return FitResult(
        pack_digest="0" * 64,
        size_bytes=size_bytes,
        ledger={"values": size_bytes},
        device="cuda",
        **numbers,  # type: ignore[arg-type]
    )


def watch_costs(workdir: Path, tasks: int) -> dict[str, Any]:
    """Processor time of the watch over `tasks` tasks: one report of progress, one write of the
    state; and the state's bytes.
    """
    names = [f"task{number:04d}" for number in range(tasks)]
    watch = BatchWatch(workdir / "watch", "scale", names, on_progress=no_progress)

    def report_all() -> None:
        for name in names:
            watch.progress(name, "search", 0.5, "5 trials")

    with watch:
        report = median_seconds(report_all) / tasks
        write = median_seconds(watch._write)
    return {
        "report": report,
        "state_write": write,
        "state_bytes": (workdir / "watch" / "state.json").stat().st_size,
    }


# --- the registry ---------------------------------------------------------------------------------


def champion(number: int, pack: Path) -> Champion:
    """A task of its own each time, with sixteen trials' rows."""
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


def registry_costs(workdir: Path, repeats: int = 15) -> dict[str, float]:
    """Wall time of one registration, and of one look-up by numbers, in the embedded registry and
    through a server on this machine.
    """
    pack = workdir / "pack.safetensors"
    pack.write_bytes(os.urandom(48 * 1024))
    costs: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        for name, uri in (
            ("embedded", None),
            ("server", stack.enter_context(mlflow_server(workdir / "server"))),
        ):
            costs[f"{name}_register"], costs[f"{name}_search"] = _register_and_search(
                open_registry(uri, workdir / name), pack, repeats
            )
    return costs


def _register_and_search(registry: Registry, pack: Path, repeats: int) -> tuple[float, float]:
    champions = iter([champion(number, pack) for number in range(repeats + 1)])
    registry.register(next(champions))  # what is made once is made now
    register = median_seconds(
        lambda: registry.register(next(champions)), repeats, time.perf_counter
    )
    return register, median_seconds(
        lambda: registry.search(max_bytes=64 * 1024, limit=10), clock=time.perf_counter
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


# --- what comes of it -----------------------------------------------------------------------------


def costs_of(measured: dict[str, Any]) -> Costs:
    """The measurements as the simulation takes them: seconds of the driver, and of the registry."""
    study, task, watch = measured["study"], measured["task"]["seconds"], measured["watch"]
    return Costs(
        result=max(study["result"], 0.0),
        trial=max(study["trial"], 0.0),
        study=max(study["study"], 0.0) + task["open"] + task["plan"] + task["selection_read"],
        study_end=task["front"],
        silent_share=max(study["silent_second"], 0.0),
        state_share=watch["state_write"],
        registration=measured["registry"]["server_register"],
    )


def scenarios(costs: Costs, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Batches that differ in how long a trial takes on its GPU, and in how many studies the driver
    follows at once.
    """
    filling = 1 + -(-arguments.gpus // LAG)
    rows = []
    more = filling * 3 // 2
    for studies, trial_seconds in (
        (1, 300),
        (filling, 30),
        (filling, 100),
        (filling, 300),
        (more, 300),
    ):
        plan = Plan(
            tasks=arguments.tasks,
            trials=arguments.trials,
            gpus=arguments.gpus,
            studies=studies,
            trial_seconds=trial_seconds,
        )
        rows.append(simulate(plan, costs))
    return rows


def limits(
    costs: Costs, measured: dict[str, Any], arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """How much each part can take, beside what the plan asks of it with trials of 300 s and 30
    epochs.
    """
    filling, epochs, trial_seconds = 1 + -(-arguments.gpus // LAG), Plan.epochs, 300
    idle = 1 - filling * costs.silent_share - costs.state_share
    results = arguments.gpus * epochs / trial_seconds
    hours = arguments.tasks * (arguments.trials * trial_seconds) / arguments.gpus / 3600
    sizes = measured["task"]["bytes"]
    files = arguments.tasks * (arguments.trials + 5)
    folder = arguments.tasks * (
        sizes["selection"] + sizes["pack"] + sizes["figure"] + arguments.trials * sizes["record"]
    )
    reads = arguments.tasks * (LAG + 1) * (sizes["shards"] + sizes["selection"])
    asked_packs = f"{arguments.tasks / hours:.0f}"
    registry = measured["registry"]
    return [
        row(
            "driver: results a second",
            f"{results:.0f}",
            f"{idle / costs.result:,.0f}" if idle > 0 else "none: polling takes all",
        ),
        row(
            "driver: studies it can follow at once",
            f"{filling}",
            f"{(1 - costs.state_share) / costs.silent_share:,.0f}",
        ),
        row(
            "registry: registrations an hour, server",
            asked_packs,
            f"{3600 / registry['server_register']:,.0f}",
        ),
        row(
            "registry: registrations an hour, embedded",
            asked_packs,
            f"{3600 / registry['embedded_register']:,.0f}",
        ),
        row(
            "object store: bytes of arguments alive",
            f"{filling * LAG * sizes['arguments'] / 1024:,.0f} KiB",
            "GiB on every node",
        ),
        row(
            "backbone: bytes a node, mapped once",
            f"{sizes['backbone'] / 2**20:,.0f} MiB",
            "a node's memory",
        ),
        row(
            "work folder: written in all, data apart",
            f"{folder / 2**30:,.1f} GiB in {files:,} files",
            "the file system",
        ),
        row(
            "work folder: read by workers, on average",
            f"{reads / (hours * 3600) / 2**20:,.1f} MiB/s",
            "the file system",
        ),
    ]


def row(part: str, asked: str, limit: str) -> dict[str, str]:
    """One line of the table of limits."""
    return {"part": part, "asked": asked, "limit": limit}


def markdown_tables(result: dict[str, Any]) -> str:
    """The tables of costs, of limits and of simulated batches."""
    study, task, watch, registry = (
        result["measured"][key] for key in ("study", "task", "watch", "registry")
    )
    milliseconds = {
        "a result of a trial, after every epoch": study["result"],
        "a trial: started, ended, its record written": study["trial"],
        "a study: set up and taken down": study["study"],
        "a second of one study in which nothing comes": study["silent_second"],
        "open a task of 1,000 images": task["seconds"]["open"],
        "size 16 proposals of ViT-B": task["seconds"]["plan"],
        "read a selection of ViT-B, K = 3": task["seconds"]["selection_read"],
        "draw a front": task["seconds"]["front"],
        "write a trial's record": task["seconds"]["record_write"],
        "report progress to the watch": watch["report"],
        f"write the state of {result['tasks']:,} tasks, once a second": watch["state_write"],
        "register a pack, embedded registry (wall time)": registry["embedded_register"],
        "register a pack, server (wall time)": registry["server_register"],
        "look packs up by numbers, server (wall time)": registry["server_search"],
    }
    kib = {
        "backbone ViT-B": task["bytes"]["backbone"],
        "selection, K = 3": task["bytes"]["selection"],
        "shards of 1,000 drawn images of 224 px": task["bytes"]["shards"],
        "pack, connections at 4 bits and K = 3, random places": task["bytes"]["pack"],
        "record of a trial": task["bytes"]["record"],
        "arguments of a trial": task["bytes"]["arguments"],
        "result of an epoch": task["bytes"]["result"],
        "result of a fit": task["bytes"]["fit_result"],
        f"state of {result['tasks']:,} tasks": watch["state_bytes"],
    }
    return "\n".join(
        [
            "| the driver's time for | ms |",
            "|---|---|",
            *(f"| {name} | {1000 * seconds:,.3g} |" for name, seconds in milliseconds.items()),
            "",
            "| bytes of | KiB |",
            "|---|---|",
            *(f"| {name} | {size / 1024:,.1f} |" for name, size in kib.items()),
            "",
            "| part | asked of it | limit |",
            "|---|---|---|",
            *(
                f"| {line['part']} | {line['asked']} | {line['limit']} |"
                for line in result["limits"]
            ),
            "",
            (
                "| studies at once | trial, s | batch, h | GPUs at work | driver at work | results"
                " a s | mean wait, ms | longest, s | registry at work |"
            ),
            "|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {line['studies']} | {line['trial_seconds']:g} | {line['hours']:.1f} |"
                f" {line['gpu_share']:.0%} | {line['driver_share']:.0%} |"
                f" {line['results_a_second']:.1f} | {1000 * line['mean_wait_seconds']:.1f} |"
                f" {line['max_wait_seconds']:.1f} | {line['registry_share']:.1%} |"
                for line in result["simulated"]
            ),
        ]
    )


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    machine = result["machine"]
    return "\n".join(
        [
            "# Scale, on paper",
            "",
            (
                f"{machine['cpu']}, {machine['cores']} cores shared with other work; torch"
                f" {machine['torch']}; commit {machine['commit']}."
            ),
            (
                f"Simulated: {result['tasks']:,} tasks of {result['trials']} trials on"
                f" {result['gpus']} GPUs."
            ),
            "",
            markdown_tables(result),
            "",
        ]
    )


def write_document(result: dict[str, Any]) -> None:
    """Put the tables between the marks of docs/scale.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    marked = f"<!-- tables -->\n\n{markdown_tables(result)}\n\n<!-- end of tables -->"
    DOCUMENT.write_text(
        re.sub(r"<!-- tables -->.*<!-- end of tables -->", lambda _: marked, text, flags=re.DOTALL),
        encoding="utf-8",
    )


def main() -> None:
    """Measure, simulate, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=100)
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks/scale"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(arguments.workdir, ignore_errors=True)
    workdir = arguments.workdir.resolve()
    workdir.mkdir(parents=True)
    finish(measure(workdir, arguments.tasks), arguments)


def measure(workdir: Path, tasks: int) -> dict[str, Any]:
    """All costs."""
    return {
        "watch": watch_costs(workdir, tasks),
        "study": study_costs(workdir),
        "task": task_costs(workdir),
        "registry": registry_costs(workdir),
    }


def finish(measured: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Simulate, and write all that is written."""
    costs = costs_of(measured)
    result = {
        "machine": describe_machine(),
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
