"""The tasks of real images in the data folder, on three backbones, shrunk to what a benchmark has
time for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fidelity import data_of
from runs import Place, Run, with_seed

from pipeline.data import prepare
from pipeline.data.splits import choose_by_class, class_quotas
from pipeline.specs import Task
from pipeline.specs.catalogue import catalogue_folder
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, open_inputs

TASKS = ("mnist", "cifar10", "elpv", "dtd10", "trashnet", "caltech101")
BACKBONES: dict[str, dict[str, str]] = {
    "embedded": {},
    "vit_small": {
        "model": "vit_small_patch14_dinov2",
        "weights": "vit_small_patch14_dinov2.saliency.safetensors",
    },
    "efficientnet": {
        "model": "tf_efficientnet_lite0",
        "weights": "tf_efficientnet_lite0.imagenet1k.safetensors",
    },
}
SIZES_PX = {"vit_small": 98, "efficientnet": 96}
"""Of images, where a backbone's is not asked for."""


def data_section(name: str, shared: Path) -> dict[str, Any]:
    """A task's images as they come."""
    folder = shared / "data" / name
    if name in ("mnist", "cifar10"):
        names = {"train": "train.tar", "test": "test.tar", "classes": "classes.txt"}
        return {key: str(folder / file) for key, file in names.items()}
    if name == "elpv":
        files = {split: str(folder / f"{split}.csv") for split in ("train", "test")}
        return {"format": "csv", **files}
    return data_of(name, shared).model_dump()


def image_task(
    name: str, backbone: str, shared: Path, size_px: int, recipe: Mapping[str, Any]
) -> Task:
    """A task on a backbone with the recipe's settings as in a task file."""
    spec: dict[str, Any] = dict(BACKBONES[backbone])
    if spec:
        spec["weights"] = str(shared / "backbones" / spec["weights"])
    else:
        demo = load_task(catalogue_folder() / "demo" / "digits.yaml")
        spec = demo.backbone.model_dump()
    return Task.model_validate(
        {
            "name": name,
            "data": data_section(name, shared),
            "input": {"size_px": size_px, "flip": name != "mnist"},
            "backbone": spec,
            "recipe": recipe,
        }
    )


def opened(task: Task, data_folder: Path, limit: int) -> Inputs:
    """The prepared task with at most so many training and validation images together."""
    prepare(task, data_folder)
    return limited(open_inputs(task, data_folder), limit)


def opened_run(run: Run, place: Place, recipe: Mapping[str, Any], size_px: int) -> Inputs:
    """The task of a run on the embedded backbone, with a recipe, the run's seed and its `limit` of
    images.
    """
    task = image_task(run["task"], "embedded", place.shared, size_px, recipe)
    inputs = opened(task, place.workdir / f"{task.name}-{size_px}", run["limit"])
    return with_seed(inputs, run["seed"])


def limited(inputs: Inputs, limit: int) -> Inputs:
    """At most so many training and validation images, as many of each as of all; test as it is."""
    splits = dict(inputs.splits)
    both, parts, first = splits["trainval"], [], 0
    if len(both) <= limit:
        return inputs
    for name in ("train", "val"):
        split = splits[name]
        counts = np.bincount(split.labels, minlength=len(inputs.index.classes))
        quotas = class_quotas(counts, round(limit / len(both) * len(split)))
        chosen = choose_by_class(split.labels, quotas, np.random.default_rng(0))
        splits[name] = replace(split, samples=split.samples[chosen], labels=split.labels[chosen])
        first = 0 if split.shards == both.shards else first
        parts.append((splits[name].samples + np.array([first, 0]), splits[name].labels))
        first += len(split.shards)
    samples = np.concatenate([samples for samples, _ in parts]).astype(np.int32)
    labels = np.concatenate([labels for _, labels in parts])
    order = np.lexsort(samples.T[::-1])
    splits["trainval"] = replace(both, samples=samples[order], labels=labels[order])
    return replace(inputs, splits=splits)
