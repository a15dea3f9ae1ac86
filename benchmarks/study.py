"""A study of 12 trials on cifar10 against the same 12 trained one by one, and what early stopping
and warm starts would change.

    python benchmarks/study.py --seed 0                       measure everything for one seed
    python benchmarks/study.py --seed 0 --modes study loop    or a part of it; the page is made of
    what has been measured

study    run_study on a private Ray, as `taskpack run` does it: one selection, reused workers, early
stopping, one thread a trial. scripts  a plain for-loop over a training script: for each trial a
fresh process that loads, selects and trains to the end, torch's own threads. loop     kinder: one
process that loads and selects once, then trains trial after trial to the end, torch's own threads.
warm     trials with the same shapes and another learning rate, started from a finished trial's
values and trained half as long.

All use the same training step and the same prepared data: 400 training and 300 validation images,
embedded ViT at 32 px. Wall times are of whole processes, from start to exit. Needs
../shared/data/cifar10. Writes benchmarks/results/study.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from study_settings import EPOCHS, FIRST_RATE, OTHER_RATES, TRAIN_PER_CLASS, VAL_PER_CLASS

STARTED = time.time()
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "study.json"
CIFAR10 = HERE.parent.parent / "shared" / "data" / "cifar10"
MODES = ("study", "scripts", "loop", "warm")


def main() -> None:
    """Measure some modes for one seed, each in a process of its own, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        mode, folder, *rest = arguments.child
        print(json.dumps(CHILDREN[mode](arguments.seed, Path(folder), *rest)))
        return
    from machine import describe_machine
    from study_page import markdown

    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"seeds": {}}
    result["machine"] = describe_machine()
    measured = result["seeds"].setdefault(str(arguments.seed), {})
    with tempfile.TemporaryDirectory() as folder:
        prepare_data(Path(folder), arguments.seed)
        for mode in arguments.modes:
            measured[mode] = (
                run_scripts(arguments.seed, Path(folder))
                if mode == "scripts"
                else run_child(mode, arguments.seed, Path(folder))
            )
            print(mode, round(measured[mode]["wall_seconds"], 1), "s", flush=True)
    result["seeds"] = dict(sorted(result["seeds"].items()))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(result))


# --- the task -------------------------------------------------------------------------------------


def make_task(folder: Path, seed: int) -> Any:
    """12 recipes, all within the budget: bits, experts and learning rate."""
    from pipeline.specs import (
        DEFAULT_RECIPE,
        Connections,
        Input,
        SearchSpace,
        ShardsData,
        Task,
        Training,
    )
    from pipeline.specs.task_files import load_task

    data = ShardsData(
        train=str(folder / "train-000000.tar"),
        val=str(folder / "val-000000.tar"),
        test=str(CIFAR10 / "test.tar"),
    )
    return Task(
        name="cifar10",
        data=data,
        input=Input(size_px=32, flip=True),
        backbone=load_task(HERE / "tasks" / "cifar10.yaml").backbone,
        recipe=DEFAULT_RECIPE.model_copy(
            update={"connections": Connections(top_k=1), "training": Training(epochs=EPOCHS)}
        ),
        search=SearchSpace(
            bits=(1, 4), experts=(0, 4), learning_rate=(FIRST_RATE, *OTHER_RATES), trials=12
        ),
        seed=seed,
    )


def prepare_data(folder: Path, seed: int) -> None:
    """Shards with the first images of each class for training, the next for validation."""
    from pipeline.data import prepare
    from pipeline.data.shards import read_shard, write_shards

    by_class: dict[Any, list[Any]] = {}
    for sample in read_shard(str(CIFAR10 / "train.tar")):
        by_class.setdefault(sample[2], []).append(sample)
    end = TRAIN_PER_CLASS + VAL_PER_CLASS
    write_shards(
        folder,
        "train",
        [sample for label in sorted(by_class) for sample in by_class[label][:TRAIN_PER_CLASS]],
    )
    write_shards(
        folder,
        "val",
        [sample for label in sorted(by_class) for sample in by_class[label][TRAIN_PER_CLASS:end]],
    )
    prepare(make_task(folder, seed), folder / "data")


def open_task(seed: int, folder: Path) -> Any:
    """The prepared task."""
    from pipeline.training import open_inputs

    return open_inputs(make_task(folder, seed), folder / "data")


def all_recipes(task: Any) -> list[Any]:
    """The 12 recipes."""
    recipes = [task.search.recipe(task.recipe, point) for point in task.search.points()]
    assert len({key_of(recipe) for recipe in recipes}) == 12
    return recipes


def key_of(recipe: Any) -> str:
    """The id of a recipe's trial."""
    from pipeline.search.trial import recipe_key

    return recipe_key(recipe)


# --- the processes that are measured --------------------------------------------------------------


def run_child(mode: str, seed: int, folder: Path, *rest: str) -> dict[str, Any]:
    """What a mode's process printed, and how long it lived."""
    started = time.time()
    command = [sys.executable, __file__, "--seed", str(seed), "--child", mode, str(folder), *rest]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "wall_seconds": time.time() - started}


def run_scripts(seed: int, folder: Path) -> dict[str, Any]:
    """One process a trial."""
    started = time.time()
    trials = [run_child("script", seed, folder, str(number)) for number in range(12)]
    phases = {name: sum(trial["phases"][name] for trial in trials) for name in trials[0]["phases"]}
    return {
        "curves": {trial["id"]: trial["curve"] for trial in trials},
        "phases": phases,
        "wall_seconds": time.time() - started,
    }


def script(seed: int, folder: Path, number: str) -> dict[str, Any]:
    """One trial from scratch, as a training script does it."""
    from pipeline.search.trial import run_trial
    from pipeline.selection import select_locally

    inputs = open_task(seed, folder)
    loaded = time.time()
    selected = select_locally(inputs, 1)
    chosen = time.time()
    recipe = all_recipes(inputs.task)[int(number)]
    curve = [score.value for score, _ in run_trial(inputs, recipe, selected)]
    return {
        "id": key_of(recipe),
        "curve": curve,
        "phases": {
            "start, imports, loading": loaded - STARTED,
            "selection": chosen - loaded,
            "training": time.time() - chosen,
        },
    }


def loop(seed: int, folder: Path) -> dict[str, Any]:
    """All trials in one process, nothing loaded or selected twice."""
    from pipeline.search.trial import run_trial
    from pipeline.selection import select_locally

    inputs = open_task(seed, folder)
    loaded = time.time()
    selected = select_locally(inputs, 1)
    chosen = time.time()
    curves = {
        key_of(recipe): [score.value for score, _ in run_trial(inputs, recipe, selected)]
        for recipe in all_recipes(inputs.task)
    }
    phases = {
        "start, imports, loading": loaded - STARTED,
        "selection": chosen - loaded,
        "training": time.time() - chosen,
    }
    return {"curves": curves, "phases": phases}


def study(seed: int, folder: Path) -> dict[str, Any]:
    """The real study on a private Ray. Workers note when a trial enters, makes its first step and
    leaves.
    """
    from pipeline.adaptation.packing import SizePlanner
    from pipeline.cluster.capacity import places
    from pipeline.cluster.session import ray_session
    from pipeline.search import run_study as module
    from pipeline.search.trial_record import TrialJournal
    from pipeline.selection import read_selection, select, select_locally_if_faster

    inputs = open_task(seed, folder)
    marks = {"start, imports, loading": time.time()}
    log = folder / f"events-{seed}.jsonl"
    module._trainable = noting(module._trainable, log)
    with tempfile.TemporaryDirectory() as kept, ray_session():
        marks["Ray starts"] = time.time()
        path, workers = Path(kept) / "selection", places(1, 0)
        if not select_locally_if_faster(inputs, 1, path, workers=workers):
            select(inputs.task, folder / "data", 1, path, workers=workers)
        marks["selection"] = time.time()
        journal = TrialJournal(Path(kept) / "trials")
        size_of = SizePlanner(
            inputs.task, inputs.backbone, inputs.index.classes, read_selection(path)
        ).size_bytes
        records = module.run_study(inputs.task, folder / "data", path, journal, size_of=size_of)
        marks["search"] = time.time()
    marks["Ray ends"] = time.time()
    times = [STARTED, *marks.values()]
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "curves": {record.id: record.curve for record in records},
        "sizes_bytes": {record.id: record.size_bytes for record in records},
        "phases": {
            name: after - before
            for name, (before, after) in zip(marks, itertools.pairwise(times), strict=True)
        },
        "first trial enters after": min(event["enter"] for event in events) - marks["selection"],
        "start-ups": list(start_ups(events)),
        "trial seconds": sum(event["leave"] - event["enter"] for event in events),
    }


def noting(trainable: Callable[..., None], log: Path) -> Callable[..., None]:
    """The trainable, with one line in `log` a trial."""

    def noted(config: dict[str, Any]) -> None:
        import os

        from pipeline.training import loop as training_loop

        event: dict[str, Any] = {"pid": os.getpid(), "enter": time.time()}
        step = training_loop._step

        def first_step(*arguments: Any) -> Any:
            event.setdefault("step", time.time())
            return step(*arguments)

        vars(training_loop)["_step"] = first_step
        try:
            trainable(config)
        finally:
            vars(training_loop)["_step"] = step
            with log.open("a") as file:
                file.write(json.dumps({**event, "leave": time.time()}) + "\n")

    return noted


def start_ups(events: list[dict[str, Any]]) -> Iterator[dict[str, float]]:
    """For each trial that follows another in its worker: seconds from that one's end to entering,
    and from there to the first step.
    """
    for pid in {event["pid"] for event in events}:
        own = sorted(
            (event for event in events if event["pid"] == pid),
            key=lambda event: float(event["enter"]),
        )
        for before, after in itertools.pairwise(own):
            yield {
                "hand-over": after["enter"] - before["leave"],
                "to first step": after["step"] - after["enter"],
            }


def warm(seed: int, folder: Path) -> dict[str, Any]:
    """Final accuracies: cold, cold in half the epochs, and half the epochs from the values of the
    trial with the first learning rate.
    """
    from pipeline.selection import select_locally

    inputs = open_task(seed, folder)
    selected = select_locally(inputs, 1)
    rows = []
    for recipe in all_recipes(inputs.task):
        if recipe.training.learning_rate != FIRST_RATE:
            continue
        _, donor = trained(inputs, recipe, selected)
        for rate in OTHER_RATES:
            half = with_training(recipe, learning_rate=rate, epochs=EPOCHS // 2)
            rows.append(
                {
                    "cold": trained(inputs, with_training(recipe, learning_rate=rate), selected)[0],
                    "cold, half": trained(inputs, half, selected)[0],
                    "warm, half": trained(inputs, half, selected, donor)[0],
                }
            )
    return {"rows": rows}


def with_training(recipe: Any, **changes: Any) -> Any:
    """The recipe with other training settings."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})


def trained(inputs: Any, recipe: Any, selected: Any, donor: Any = None) -> tuple[float, Any]:
    """Validation accuracy at the end, and the trained model. With a donor, its values are where
    training starts.
    """
    import torch
    from runs import train

    from pipeline.adaptation import attach
    from pipeline.training import evaluate

    task = inputs.task
    model = attach(
        inputs.backbone, recipe, len(inputs.index.classes), selected=selected, seed=task.seed
    )
    if donor is not None:
        with torch.no_grad():
            for own, given in zip(
                model.values.parameters(), donor.values.parameters(), strict=True
            ):
                own.copy_(given)
    train(model, inputs, recipe, task.seed)
    return (
        inputs.metric.value(
            evaluate(model, inputs.reader("val"), inputs.splits["val"], inputs.kind)
        ),
        model,
    )


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "study": study,
    "script": script,
    "loop": loop,
    "warm": warm,
}


if __name__ == "__main__":
    main()
