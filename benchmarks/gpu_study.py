"""A study of 12 trials from start to registered pack, and how busy it keeps a GPU: a part of
gpu.py.

The task is dtd10, 500 training and 700 test photographs of textures at 224 px, trained with the
default recipe for the catalogue's 100 epochs; its 12 recipes differ in bits, experts and learning
rate. It runs as `taskpack run` runs it, on a private Ray of this machine, whose start is counted;
imports of this process are not. NVML tells each second how busy the GPU is.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.specs import (
    DEFAULT_RECIPE,
    Backbone,
    CsvData,
    DrawnData,
    Input,
    SearchSpace,
    Task,
    Training,
)
from pipeline.training.usage import SAMPLE_SECONDS
from pipeline.utils.devices import busy_share, is_accelerator

GOAL = 0.7
"""The share of the time for which the GPU should compute."""
TRIALS = 12
NEEDED = ("ray.train.torch", "ray.tune", "mlflow", "optuna", "pipeline.driver.batch")
"""Modules that a bare machine may lack."""


@dataclass(frozen=True)
class StudySetting:
    """What is run, and on what.

    Args:
        data: the folder of dtd10; None draws small images instead.
        limit_seconds: as `taskpack run --time-limit`: the study leaves out trials to end in time.
    """

    backbone: Backbone
    size_px: int
    data: Path | None
    epochs: int
    device: str
    limit_seconds: float | None = None

    def task(self) -> Task:
        """The task, with 12 recipes."""
        files = {} if self.data is None else self.files(self.data)
        return Task(
            name="dtd10" if self.data else "drawn",
            data=(
                CsvData(format="csv", **{name: str(path) for name, path in files.items()})
                if files
                else DrawnData(
                    format="drawn", kind="orientation", train_samples=80, test_samples=40
                )
            ),
            input=Input(size_px=self.size_px, flip=self.data is not None),
            backbone=self.backbone,
            recipe=DEFAULT_RECIPE.changed(training=Training(epochs=self.epochs)),
            search=SearchSpace(
                bits=(1, 4), experts=(0, 4), learning_rate=(0.002, 0.004, 0.008), trials=TRIALS
            ),
        )

    @staticmethod
    def files(data: Path) -> dict[str, Path]:
        """The lists of images, by split."""
        return {split: (data / f"{split}.csv").resolve() for split in ("train", "test")}

    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        for module in NEEDED:
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"{error.name} is not installed"
        if self.data is not None:
            for path in self.files(self.data).values():
                if not path.exists():
                    return f"there is no {path}; name the folder of dtd10 with --data"
        return ""


@dataclass
class Course:
    """The stages of a task as they begin, and what was said of trials per GPU. Seconds are since
    this was made.
    """

    started: float = field(default_factory=time.monotonic)
    begun: dict[str, float] = field(default_factory=dict)
    trials_per_gpu: str = ""

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def progress(self, task: str, stage: str, share: float, remark: str) -> None:
        """As `OnProgress`."""
        self.begun.setdefault(stage, self.seconds())
        if "per GPU" in remark:
            self.trials_per_gpu = remark

    def stages(self, samples: list[tuple[float, float]]) -> dict[str, dict[str, float | None]]:
        """Seconds of each stage, and the share of them in which the GPU computed."""
        ends = [*list(self.begun.values())[1:], self.seconds()]
        return {
            stage: {
                "seconds": end - begin,
                "busy": mean([share for at, share in samples if begin <= at < end]),
            }
            for (stage, begin), end in zip(self.begun.items(), ends, strict=True)
            if stage != "done"
        }


def mean(shares: list[float]) -> float | None:
    """The mean; None of nothing."""
    return statistics.mean(shares) if shares else None


@contextlib.contextmanager
def watched(device: str, course: Course) -> Iterator[list[tuple[float, float]]]:
    """Pairs of seconds and the share in which the device computed, one per second of this context,
    as far as its driver tells.
    """
    samples: list[tuple[float, float]] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(SAMPLE_SECONDS):
            if (share := busy_share(device)) is not None:
                samples.append((course.seconds(), share))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def measure_study(setting: StudySetting) -> dict[str, Any]:
    """Run the study; its times, trials and how busy it kept the device, or why there is none."""
    if reason := setting.missing():
        return {"skipped": reason}
    from pipeline.driver.batch import run_batch
    from pipeline.driver.stages import Placement

    placement = Placement() if is_accelerator(setting.device) else Placement(per_trial=(1, 0))
    with tempfile.TemporaryDirectory() as folder:
        course = Course()
        with watched(setting.device, course) as samples:
            (outcome,) = run_batch(
                [setting.task()],
                Path(folder),
                registry_uri=f"sqlite:///{folder}/registry.db",
                placement=placement,
                time_limit_seconds=setting.limit_seconds,
                on_progress=course.progress,
            )
        rates = trial_rates(Path(folder))
    if outcome.error is not None or outcome.registered is None:
        return {"skipped": f"failed in {outcome.stage}: {outcome.error}"}
    seconds = course.begun["done"]
    kept = [(at, share) for at, share in samples if at <= seconds]
    return {
        "task": outcome.task,
        "epochs": setting.epochs,
        "trials": [{**trial.row(), **rates.get(trial.id, {})} for trial in outcome.trials],
        "trials_left": outcome.trials_left,
        "trials_per_gpu": course.trials_per_gpu,
        "seconds": seconds,
        "packs_per_hour": 3600 / seconds,
        "busy": mean([share for _, share in kept]),
        "stages": course.stages(kept),
        "samples": [(round(at, 1), share) for at, share in kept],
        "size_bytes": outcome.registered.size_bytes,
        "metrics": outcome.registered.metrics,
    }


def trial_rates(workdir: Path) -> dict[str, dict[str, float]]:
    """Training images per second of each trial that ran, from the log of events."""
    lines = (workdir / "logs" / "batch.jsonl").read_text().splitlines()
    name = "images_per_second"
    return {
        event["trial"]: {name: event[name]}
        for event in map(json.loads, lines)
        if event["event"] == "trial" and name in event
    }


# --- the page -------------------------------------------------------------------------------------


def study_lines(study: dict[str, Any]) -> list[str]:
    """The section of a study."""
    if "skipped" in study:
        return ["## Study", "", f"Not run: {study['skipped']}.", ""]
    ran = [trial for trial in study["trials"] if trial["state"] != "rejected"]
    left = f", {study['trials_left']} left out for lack of time" if study["trials_left"] else ""
    return [
        "## Study",
        "",
        (
            f"{study['task']}, {len(ran)} trials of at most {study['epochs']} epochs{left}:"
            f" {study['seconds']:.0f} s from start to registered, {study['packs_per_hour']:.1f}"
            f" packs per hour. {study['trials_per_gpu'] or 'Trials do not share a GPU'}."
        ),
        "",
        _busy_line(study),
        "",
        "| stage | s | busy |",
        "|---|---|---|",
        *(
            f"| {stage} | {each['seconds']:.1f} | {percent(each['busy'])} |"
            for stage, each in study["stages"].items()
        ),
        "",
        "| trial | state | epochs | s | images/s | waited for images | busy | GiB |",
        "|---|---|---|---|---|---|---|---|",
        *map(_trial_line, ran),
        "",
    ]


def _busy_line(study: dict[str, Any]) -> str:
    if study["busy"] is None:
        return "NVML does not tell how busy a GPU is here."
    search = study["stages"].get("search", {}).get("busy")
    return (
        f"The GPU was busy for {percent(study['busy'])} of the time, and for {percent(search)} of"
        f" the search; the goal is {GOAL:.0%}. By the second:"
        f" {' '.join(f'{100 * share:.0f}' for _, share in study['samples'])}"
    )


def _trial_line(trial: dict[str, Any]) -> str:
    memory = trial["gpu_memory_bytes"]
    gib = "" if memory is None else f"{memory / 2**30:.2f}"
    return (
        f"| {json.dumps(trial['point'])} | {trial['state']} | {trial['epochs']} |"
        f" {trial['seconds']:.1f} | {trial.get('images_per_second', 0):.0f} |"
        f" {percent(trial['waiting'])} | {percent(trial['gpu_busy'])} |"
        f" {gib} |"
    )


def percent(share: float | None) -> str:
    """A share as a cell of a table."""
    return "" if share is None else f"{share:.0%}"
