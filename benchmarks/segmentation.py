"""Segmentation under byte budgets: what the default search finds at 4, 16 and 64 KiB, against the
linear head alone, LoRA and full fine-tuning.

    python benchmarks/segmentation.py [--tasks ...] [--methods ...] [--seeds 0] [--epochs 5]
                                      [--samples 160] [--trials 4] [--shared FOLDER]
    python benchmarks/segmentation.py --page     write the page from what has been measured

To fit one core, tasks have `--samples` training images, evenly drawn from their own; validation and
test sets are whole. Every method trains each of its recipes on train and ranks them on validation:
the default search the first `--trials` of its space, without early stopping, the others a few
learning rates. The champion's recipe is then fitted on train and validation, and its pack
reads the test set once, reloaded from its file.

Interrupt it and start it again: finished trials and fits are kept. Needs the data and the
backbones, by default in the folder `shared` beside the project, but neither Ray nor MLflow. Writes
benchmarks/results/segmentation.json and .md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pages import table
from runs import Place, Run, by_task, measure_missing, parse_arguments, with_seed
from searches import BUDGETS, search_and_fit, within_budget

from pipeline.adaptation.parts.lora import convolution_targets
from pipeline.data import prepare
from pipeline.specs import Budget, Recipe, Task
from pipeline.training import Inputs, open_inputs

RESULTS = Path(__file__).parent / "results" / "segmentation.json"
EFFICIENTNET = ("tf_efficientnet_lite0", "tf_efficientnet_lite0.imagenet1k.safetensors")
VIT = ("vit_small_patch14_dinov2", "vit_small_patch14_dinov2.saliency.safetensors")
POLYPS: dict[str, Any] = {"classes": ["background", "polyp"], "threshold": 127}
STREETS: dict[str, Any] = {
    "classes": [
        *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"),
        *("pedestrian", "bicyclist"),
    ],
    "ignore": 11,
}
TASKS: dict[str, tuple[str, tuple[str, str], int, str]] = {
    "kvasir_seg, EfficientNet-lite0": ("kvasir_seg", EFFICIENTNET, 128, "mDice"),
    "kvasir_seg, ViT-S": ("kvasir_seg", VIT, 112, "mDice"),
    "camvid, EfficientNet-lite0": ("camvid", EFFICIENTNET, 128, "mIoU"),
}
"""By name: the data, the backbone, the input's size in pixels and the metric."""
FUSE: dict[str, Any] = {"bits": 32, "fuse": 16}
BASELINES: dict[str, tuple[dict[str, Any], Sequence[float]]] = {
    "linear head": ({"preset": "linear", "head": {"bits": 32}}, (0.003, 0.01)),
    "LoRA, 32 bits": ({"lora": {"rank": 8, "bits": 32, "scale": 4}, "head": FUSE}, (0.001, 0.003)),
    "full fine-tuning": ({"full": {"bits": 32}, "head": FUSE}, (3e-5, 1e-4, 1e-3)),
}
"""By method: the recipe and the learning rates that are tried."""
METHODS = (*BUDGETS, *BASELINES)
BATCH = 8
GOAL_DATA, GOAL_PACK, REFERENCE = "kvasir_seg", "default search, 16 KiB", "full fine-tuning"
OTHER_REFERENCE = "LoRA, 32 bits"
"""Where the trials of the first have too few steps to train it."""
GOAL_POINTS = 2.0
"""The pack should lose at most this much against the reference."""


def few(folder: Path, samples: int | None, table: Path) -> str:
    """A split as a table of images and masks: `samples` of its pairs, evenly drawn; None: all."""
    names = sorted(path.stem for path in (folder / "images").iterdir())
    step = max(1, len(names) / (samples or len(names)))
    drawn = [names[int(number * step)] for number in range(min(samples or len(names), len(names)))]
    paths = {path.stem: path for path in (folder / "masks").iterdir()}
    lines = [f"{folder}/images/{name}.jpg,{paths[name]}" for name in drawn]
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join(["image,mask", *lines]) + "\n")
    return str(table)


def open_task(run: Run, place: Place) -> Inputs:
    """The task of a run, prepared, with nothing to adapt."""
    name, (model, weights), size_px, metric = TASKS[run["task"]]
    source, folder = place.shared / "data" / name, place.workdir / f"{name}-{run['samples']}"
    masks = POLYPS if name == "kvasir_seg" else STREETS
    splits = {"train": "train", "val": "val", "test": "test"}
    if name == "kvasir_seg":
        splits["val"] = "validation"
    tables = {
        split: few(
            source / own, run["samples"] if split == "train" else None, folder / f"{split}.csv"
        )
        for split, own in splits.items()
    }
    task = Task.model_validate(
        {
            "name": name,
            "kind": "segmentation",
            "metric": metric,
            "data": {"format": "masks", **tables, **masks},
            "input": {"size_px": size_px},
            "backbone": {"model": model, "weights": str(place.shared / "backbones" / weights)},
            "recipe": {"preset": "linear"},
        }
    )
    prepare(task, folder / "data")
    return with_seed(open_inputs(task, folder / "data"), run["seed"])


def recipes_of(run: Run, inputs: Inputs) -> tuple[Inputs, list[Recipe]]:
    """The task as a method sees it, and the recipes that the method tries."""
    training = {"epochs": run["epochs"], "batch_size": BATCH}
    if run["method"] in BUDGETS:
        return within_budget(inputs, BUDGETS[run["method"]], training, run["trials"])
    content, rates = BASELINES[run["method"]]
    if "lora" in content and (targets := convolution_targets(inputs.backbone.model)):
        content = {**content, "lora": {**content["lora"], "targets": targets}}
    recipes = [
        Recipe.model_validate({**content, "training": {**training, "learning_rate": rate}})
        for rate in rates
    ]
    unlimited = inputs.task.model_copy(update={"budget": Budget(max_bytes=2**40, level=0.5)})
    return replace(inputs, task=unlimited), recipes


def measure(run: Run, place: Place) -> Run:
    """One method on one task, from its trials to the tested pack."""
    inputs, recipes = recipes_of(run, open_task(run, place))
    name = f"{inputs.backbone.spec.model}-{run['epochs']}-{run['seed']}"
    found = search_and_fit(inputs, recipes, inputs.data_folder.parent / name)
    champion, result = found.champion, found.result
    return {
        **run,
        "champion": champion.point,
        "learning_rate": found.recipe.training.learning_rate,
        "tried": [{"point": each.point, "val": each.val_metric} for each in found.records],
        "val": champion.val_metric,
        "test": result.test_metric,
        "stderr": result.test_metric_stderr,
        "metric": result.metric,
        "bytes": result.size_bytes,
        "seconds": found.seconds,
    }


def page(runs: Sequence[Run]) -> str:
    """A table per task, and whether the goal is met."""
    lines = [
        "# Segmentation",
        "",
        "Test metric in percent, of the reloaded pack, with its standard error over the images, at",
        "the sizes of the masks. The ViT-S is `vit_small_patch14_dinov2`, further trained by",
        "others on saliency: finding one object is what it has seen. Methods share data, splits",
        "and epochs; each is tuned on validation only, over few values. Training sets are cut to",
        "fit one core, so all numbers are below what whole ones give. A fit also trains on the",
        "validation images, two or three times those of a trial, so test metrics can be far above",
        "those of validation.",
        "",
        *(_goal_line(runs, task) for task in TASKS if TASKS[task][0] == GOAL_DATA),
        *by_task(runs, tuple(TASKS), _rows),
    ]
    return "\n".join(lines) + "\n"


def _goal_line(runs: Sequence[Run], task: str) -> str:
    """Whether the pack is as close to full fine-tuning as it should be."""
    own = {run["method"]: run for run in runs if run["task"] == task}
    found = {method: run["test"] for method, run in own.items()}
    if not {GOAL_PACK, REFERENCE} <= found.keys():
        return f"- {task}: not measured at the sizes of the masks yet."
    if own[REFERENCE]["val"] < own[GOAL_PACK]["tried"][0]["val"]:
        return (
            f"- {task}: whether the goal is met stays open. {_compared(own, REFERENCE)}, but at the"
            f" learning rates tried, {REFERENCE} is below a linear head of one bit on validation:"
            f" a trial has too few steps for it."
            f"{f' {_compared(own, OTHER_REFERENCE)}.' if OTHER_REFERENCE in own else ''}"
        )
    is_met = "met" if 100 * (found[GOAL_PACK] - found[REFERENCE]) >= -GOAL_POINTS else "not met"
    return (
        f"- {task}: {_compared(own, REFERENCE)}; the goal, at most {GOAL_POINTS:g} points below, is"
        f" {is_met} in this one run."
    )


def _compared(own: Mapping[str, Run], reference: str) -> str:
    """How far the pack is from another method of the same task, in points of the test metric."""
    points = 100 * (own[GOAL_PACK]["test"] - own[reference]["test"])
    errors = [100 * own[method]["stderr"] for method in (GOAL_PACK, reference)]
    return (
        f"The pack of the {GOAL_PACK} is {points:+.1f} points from {reference}, with standard"
        f" errors of {errors[0]:.1f} and {errors[1]:.1f} points"
    )


def _rows(runs: Sequence[Run]) -> list[str]:
    metric, ordered = runs[0]["metric"], sorted(runs, key=lambda run: METHODS.index(run["method"]))
    columns = ("method", "bytes", f"validation {metric}", f"test {metric}", "champion")
    rows = (
        (
            run["method"],
            f"{run['bytes']:,}",
            f"{100 * run['val']:.1f}",
            f"{100 * run['test']:.1f} ± {100 * run['stderr']:.1f}",
            f"{_shown(run['champion'])}; {run['learning_rate']:g}; best of {len(run['tried'])}",
        )
        for run in ordered
    )
    return table(columns, rows)


def _shown(parts: dict[str, Any]) -> str:
    """A recipe in a cell: `lora rank 8 bits 1, head bits 2`."""
    return ", ".join(
        " ".join([name, *(f"{key} {value}" for key, value in spec.items())])
        for name, spec in parts.items()
    )


def main() -> None:
    """Measure what is missing, write the page."""
    counts = {"samples": 160, "trials": 4}
    arguments = parse_arguments(__doc__, tuple(TASKS), "method", METHODS, (0,), counts)
    runs = measure_missing(RESULTS, arguments, "method", lambda runs, place: None, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
