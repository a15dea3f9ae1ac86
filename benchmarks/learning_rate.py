"""Validation accuracy against the learning rate: one line per backbone, task and recipe.

    python benchmarks/learning_rate.py [--cases vit_small:dtd10 embedded:mnist ...] [--recipes ...]
    [--rates ...] [--seeds 0 1 2]
    python benchmarks/learning_rate.py --page     write the page from what has been measured

A run trains one recipe at one rate on the training images and is scored on the validation images;
the test images are never read. All runs of a task share one split and one selection, so their
differences are due to the rate. Interrupt it and start it again: finished runs are kept. Needs the
data and the backbones beside the project. Writes benchmarks/results/learning_rate.json, .md and
.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from image_tasks import image_task
from learning_rate_page import write_page
from machine import describe_machine
from runs import train

from pipeline.adaptation import SelectedIndex, attach
from pipeline.data import prepare
from pipeline.inputs.learning_rate import default_learning_rate
from pipeline.selection import read_selection, select_locally, write_selection
from pipeline.specs import Recipe, Task
from pipeline.specs.catalogue import catalogue_folder
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, evaluate, open_inputs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "learning_rate.json"
SHARED = HERE.parent.parent / "shared"
DEMO = ("digits", "counting", "orientation")
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
DEFAULT = {"preset": "default"}
"""The recipe a task is opened with; every run has its own."""
ONE_BIT = {"bits": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "all parts, 1 bit": {
        "connections": ONE_BIT,
        "biases": ONE_BIT,
        "norms": ONE_BIT,
        "smoa": ONE_BIT,
        "head": ONE_BIT,
    },
    "house recipe": {"connections": {}, "biases": {}, "norms": {}, "smoa": {}},
    "adapter, 1 bit": {"adapter": ONE_BIT},
    "adapter of width 16, 1 bit": {"adapter": {"width": 16, "bits": 1}, "head": {"bits": 2}},
    **{
        f"LoRA of rank {rank}, 1 bit, scale {scale}": {
            "lora": {"rank": rank, "bits": 1, "scale": scale},
            "head": {"bits": 2},
        }
        for rank in (2, 8, 16)
        for scale in (1, 2, 4)
    },
    "connections and biases": {"connections": {}, "biases": {}},
    "head": {},
}
CONVOLUTIONAL: dict[str, dict[str, Any]] = {
    "all parts, 1 bit": {
        "connections": ONE_BIT,
        "norms": {"which": "all", "bits": 1},
        "head": ONE_BIT,
    },
    "norms": {"norms": {"which": "all"}},
    "connections": {"connections": {}},
    "head": {},
}
"""The recipes with a place in an EfficientNet, whose layers have neither biases nor blocks with an
MLP.
"""
SIZES_PX = {"vit_small": 98, "efficientnet": 64, "embedded": 64}
CASES = ("embedded:dtd10", "embedded:mnist", "vit_small:dtd10", "efficientnet:dtd10")


def make_task(case: str) -> Task:
    """The task of one case, at the case's input size."""
    backbone, name = case.split(":")
    if name in DEMO:
        return load_task(catalogue_folder() / "demo" / f"{name}.yaml")
    if name != "mnist":
        return image_task(name, backbone, SHARED, SIZES_PX[backbone], DEFAULT)
    task = load_task(HERE / "tasks" / "mnist.yaml")
    size = task.input.model_copy(update={"size_px": SIZES_PX[backbone]})
    return task.model_copy(update={"input": size})


def open_case(case: str, workdir: Path) -> tuple[Inputs, SelectedIndex]:
    """The prepared task and its selection, which is made once."""
    task = make_task(case)
    prepare(task, workdir / task.name)
    inputs = open_inputs(task, workdir / task.name)
    selection = workdir / f"{case.replace(':', '-')}.safetensors"
    if not selection.exists():
        write_selection(select_locally(inputs, 1), selection)
    return inputs, read_selection(selection)


def measure(inputs: Inputs, recipe: Recipe, selected: SelectedIndex, seed: int) -> dict[str, Any]:
    """Train one recipe and score it once, in the end; the split and the selection are those of seed
    0.
    """
    started = time.process_time()
    chosen = selected if recipe.connections else None
    model = attach(inputs.backbone, recipe, len(inputs.index.classes), selected=chosen, seed=seed)
    losses = [round(loss, 4) for loss in train(model, inputs, recipe, seed)]
    outcomes = evaluate(model, inputs.reader("val"), inputs.splits["val"], inputs.kind)
    seconds = round(time.process_time() - started, 1)
    return {
        "correct": round(inputs.metric.value(outcomes) * len(outcomes)),
        "samples": len(outcomes),
        "losses": losses,
        "cpu_seconds": seconds,
    }


def main() -> None:
    """Measure what is missing, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workdir", type=Path, default=HERE.parent / "runs" / "learning_rate")
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": [], "defaults": {}}
    for case in () if arguments.page else arguments.cases:
        recipes = CONVOLUTIONAL if case.startswith("efficientnet") else RECIPES
        inputs, selected = open_case(case, arguments.workdir)
        result["defaults"][case] = default_learning_rate(inputs.backbone.model)
        for seed, name, rate in itertools.product(
            arguments.seeds, arguments.recipes or recipes, arguments.rates
        ):
            run = {
                "case": case,
                "recipe": name,
                "rate": rate,
                "seed": seed,
                "epochs": arguments.epochs,
            }
            if any(run.items() <= done.items() for done in result["runs"]):
                continue
            recipe = Recipe.model_validate(
                {**recipes[name], "training": {"learning_rate": rate, "epochs": arguments.epochs}}
            )
            result["machine"] = describe_machine()
            commit = {"commit": result["machine"]["commit"]}
            result["runs"].append(run | measure(inputs, recipe, selected, seed) | commit)
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
            print(result["runs"][-1], flush=True)
    write_page(result, RESULTS.with_suffix(".md"))


if __name__ == "__main__":
    main()
