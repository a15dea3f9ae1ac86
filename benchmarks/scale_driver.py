"""What a batch costs its driver in processor time and bytes: studies, tasks and the watch."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from pipeline.adaptation.packing import SizePlanner
from pipeline.adaptation.selected.ranking import rank_indices
from pipeline.adaptation.sites import weight_shapes
from pipeline.backbones import LoadedBackbone, load_backbone, share
from pipeline.cluster.session import ray_session
from pipeline.data import prepare
from pipeline.data.index import read_index
from pipeline.driver.monitor.batch_watch import BatchWatch
from pipeline.driver.planning import check_study, listed_sizes, resolved
from pipeline.driver.stages import no_progress
from pipeline.inputs.task_inputs import open_unresolved
from pipeline.kinds import Outcomes
from pipeline.reports.front_figure import draw_front
from pipeline.search.champion import choose_champion
from pipeline.search.proposer import make_proposer
from pipeline.search.run_study import run_study
from pipeline.search.trial import recipe_key
from pipeline.search.trial_record import TrialJournal, TrialRecord
from pipeline.selection import read_selection
from pipeline.selection.stage import write_selection
from pipeline.specs import Backbone, Input, Recipe, Task
from pipeline.training import open_inputs
from pipeline.training.fit import FitResult

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
VALIDATED = 10_000, 100
"""Validation images and classes of the choice of a champion."""
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


@dataclass(frozen=True)
class StudyRun:
    """What a study asked of its driver."""

    trials: int
    results: int
    processor_seconds: float
    wall_seconds: float


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


def task_costs(workdir: Path) -> dict[str, Any]:
    """Processor time of the driver for a ViT-B task of 1,000 images, and the bytes it leaves."""
    task, data = vit_task(), workdir / "vit"
    prepare(task, data)
    backbone = load_backbone(task.backbone, Input(size_px=224, flip=False))
    share(backbone, workdir / "vit.safetensors")
    selection = workdir / "selection.safetensors"
    write_random_selection(backbone, selection)
    inputs = open_inputs(task, data)
    task = inputs.task
    started = time.process_time()
    sizes_by_key = listed_sizes(inputs, selection)
    coded = time.process_time() - started
    recipe = task.search.recipe(
        task.recipe, {"bits": 4, "experts": 4, "top_k": 3, "learning_rate": 0.001}
    )
    size_bytes = sizes_by_key[recipe_key(recipe)]
    records = records_of(task, size_bytes)
    journal, figure = TrialJournal(workdir / "journal"), workdir / "front.png"
    seconds = {
        "open": median_seconds(lambda: (read_index(data), open_inputs(task, data))),
        "check": checking_seconds(data),
        "code": coded - (listed := median_seconds(lambda: listed_sizes(inputs, selection), 3)),
        "list": listed,
        "plan": median_seconds(lambda: propose_all(task, sizes_by_key), 3),
        "selection_read": median_seconds(lambda: read_selection(selection)),
        "record_write": median_seconds(lambda: write_all(journal, records)) / len(records),
        "champion": champion_seconds(task, records),
        "front": median_seconds(lambda: draw(records, figure), 3),
    }
    sizes = {
        "backbone": (workdir / "vit.safetensors").stat().st_size,
        "selection": selection.stat().st_size,
        "index": (data / "index.json").stat().st_size if (data / "index.json").exists() else 0,
        "shards": sum(path.stat().st_size for path in data.rglob("*.tar")),
        "record": max(path.stat().st_size for path in (workdir / "journal").glob("*.json")),
        "pack": size_bytes,
        "figure": figure.stat().st_size,
        **message_sizes(task, recipe, size_bytes),
    }
    return {"seconds": seconds, "bytes": sizes}


def checking_seconds(data: Path) -> float:
    """Processor time of a worker that derives the search space of a task that names nothing, and
    rehearses its recipes.
    """
    settings = vit_task().model_dump(include={"name", "data", "input", "backbone"})
    inputs = open_unresolved(Task.model_validate(settings), data)
    return median_seconds(lambda: resolved(inputs, check_study), 1)


def champion_seconds(task: Task, records: Sequence[TrialRecord]) -> float:
    """Processor time of a worker that compares these trials on `VALIDATED` drawn outputs."""
    samples, classes = VALIDATED
    targets = np.arange(samples) % classes
    drawn = np.random.default_rng(0).normal(size=(samples, classes)).astype(np.float32)
    drawn[np.arange(samples), targets] += 2
    outcomes = Outcomes(drawn, targets)
    return median_seconds(lambda: choose_champion(records, task, lambda trial: outcomes), 1)


def vit_task() -> Task:
    """1,000 drawn images at 224 px on ViT-B, 16 trials."""
    return Task.model_validate(
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


def write_random_selection(backbone: LoadedBackbone, path: Path) -> None:
    """Three connections per neuron at random places."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.rand(shape, generator=generator)
        for name, shape in weight_shapes(backbone.model).items()
    }
    write_selection(rank_indices(drawn, "neuron", 3), path)


def propose_all(task: Task, sizes: Mapping[str, int]) -> None:
    """Propose sixteen trials, each told as complete, from the sizes that a worker listed."""
    proposer = make_proposer(task, lambda recipe: sizes[recipe_key(recipe)])
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


def write_all(journal: TrialJournal, records: Sequence[TrialRecord]) -> None:
    """Write every record to the journal."""
    for record in records:
        journal.write(record)


def draw(records: Sequence[TrialRecord], path: Path) -> None:
    """The front of the records, as a batch draws it."""
    draw_front(
        [record.row() for record in records],
        path,
        metric="accuracy",
        title="t",
        max_bytes=65536,
        champion=records[0].id,
    )


def message_sizes(task: Task, recipe: Recipe, size_bytes: int) -> dict[str, int]:
    """Bytes of what driver and workers send each other."""
    arguments = {"task": task.model_dump_json(), "recipe": recipe.model_dump_json()}
    return {
        "arguments": len(pickle.dumps(arguments)),
        "result": len(pickle.dumps({"epoch": 1, "metric": 0.5, "remark": ""})),
        "fit_result": len(pickle.dumps(a_fit(size_bytes))),
    }


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
