"""What `folds: 5` buys on few images: the champion of the same nine recipes, validated on a fifth
of the training images or on all of them in five folds.

    python benchmarks/folds.py [--tasks dtd10 elpv trashnet] [--seeds 0 1 2] [--epochs 8]
                               [--shared FOLDER]
    python benchmarks/folds.py --page     write the page from what has been measured

The embedded backbone at 32 px. Each seed draws its own images: a few of each class of the training
set, with the whole test set. Both champions are fitted on all of the drawn images, and their
reloaded packs read the test set once. Interrupt it and start it again: finished trials, fits and
cells are kept. Writes benchmarks/results/folds.json and .md.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import numpy as np
import torch
from bytes import Cell, best_trial, champion, complete, run_study, tested
from image_tasks import image_task
from machine import describe_machine
from pages import mean_difference
from runs import SHARED, percent

from pipeline.data import prepare
from pipeline.training import open_inputs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "folds.json"
PER_CLASS = {"dtd10": 15, "elpv": 40, "trashnet": 25}
"""Images of each class: about 150 in all."""
SIZE_PX, FOLDS = 32, 5
CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    *({"parts": "head", "head_bits": bits} for bits in (1, 2, 8)),
    *({"parts": "adapter", "head_bits": 2, "width": width} for width in (2, 8, 32)),
    *({"parts": "lora", "head_bits": 2, "width": rank, "scale": 4.0} for rank in (1, 4, 16)),
)
VALIDATIONS: dict[str, dict[str, Any]] = {"a fifth": {}, "five folds": {"folds": FOLDS}}


def draw_images(name: str, seed: int, shared: Path, manifest: Path) -> None:
    """Write a manifest with some training images of each class."""
    folder = shared / "data" / name
    by_class: dict[str, list[Path]] = defaultdict(list)
    if name == "trashnet":
        for path in sorted((folder / "train").glob("*/*")):
            by_class[path.parent.name].append(path)
    else:
        with (folder / "train.csv").open() as lines:
            for row in csv.DictReader(lines):
                by_class[row["label"]].append(folder / row["path"])
    random = np.random.default_rng(seed)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with manifest.open("w") as out:
        writer = csv.writer(out)
        writer.writerow(["path", "label"])
        for label, paths in sorted(by_class.items()):
            chosen = random.permutation(len(paths))[: PER_CLASS[name]]
            writer.writerows([paths[number], label] for number in sorted(chosen))


def open_cell(name: str, seed: int, validation: str, options: argparse.Namespace) -> Cell:
    """The drawn images of a seed as a task, validated in one way."""
    folder = options.workdir / f"{name}-{seed}-{options.epochs}-{validation.replace(' ', '-')}"
    recipe = {"preset": "linear", "training": {"epochs": options.epochs}}
    task = image_task(name, "embedded", options.shared, SIZE_PX, recipe)
    manifest = options.workdir / f"{name}-{seed}.csv"
    draw_images(name, seed, options.shared, manifest)
    test = options.shared / "data" / name / "test"
    data = {"format": "csv", "train": str(manifest), "test": str(test.with_suffix(".csv"))}
    if name == "trashnet":
        data["test"] = str(_manifest_of_folder(test, options.workdir / "trashnet-test.csv"))
    search = {"configurations": CONFIGURATIONS, "trials": len(CONFIGURATIONS)}
    task = task.changed(data=data, search=search, seed=seed, **VALIDATIONS[validation])
    prepare(task, folder / "data")
    inputs = open_inputs(task, folder / "data")
    return Cell(written=task, inputs=inputs, selected={}, folder=folder, device="cpu")


def _manifest_of_folder(folder: Path, manifest: Path) -> Path:
    rows = [f"{path},{path.parent.name}" for path in sorted(folder.glob("*/*"))]
    manifest.write_text("\n".join(["path,label", *rows]) + "\n")
    return manifest


def measure(cell: Cell) -> dict[str, Any]:
    """The choices of a study, tested, with its time; by the product's rule and by validation."""
    task = cell.inputs.task
    records = run_study(cell, task)
    chosen, best = champion(cell, records, task), best_trial(complete(records))
    assert chosen is not None
    assert best is not None
    return {
        "champion": tested(cell, task, chosen) | {"val": chosen.val_metric},
        "best": tested(cell, task, best) | {"val": best.val_metric},
        "seconds": sum(record.seconds for record in records),
        "validation_images": cell.inputs.validation_samples,
    }


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The means over all task and seed, then each."""
    lines = [
        "# Validation in folds",
        "",
        "Nine recipes on about 150 images of each task, validated on a fifth of them or on all in",
        "five folds. Test accuracies in percent are those of reloaded packs fitted on all images;",
        "differences, five folds less a fifth, are paired by task and seed, with their standard",
        "errors.",
        "",
        "| choice | a fifth: test % | five folds: test % | difference | bytes, folds to a fifth |",
        "|---|---:|---:|---:|---:|",
    ]
    pairs = _pairs(rows)
    for choice in ("champion", "best"):
        points = [[percent(row[choice]) for row in pair] for pair in pairs]
        differences = [folds - once for once, folds in points]
        share = geometric_mean(
            folds[choice]["bytes"] / once[choice]["bytes"] for once, folds in pairs
        )
        means = " | ".join(f"{fmean(each):.1f}" for each in zip(*points, strict=True))
        lines.append(f"| {choice} | {means} | {mean_difference(differences)} | {share:.2f} |")
    off = [fmean(abs(100 * r["champion"]["val"] - percent(r["champion"])) for r in own)
           for own in zip(*pairs, strict=True)]  # fmt: skip
    ratio = fmean(folds["seconds"] / once["seconds"] for once, folds in pairs)
    lines += [
        "",
        "The champion's accuracy on the validation images is off by"
        f" {off[0]:.1f} points from that on the test images with a fifth, and by {off[1]:.1f} with"
        f" five folds, on average. The study takes {ratio:.1f} times as long.",
        "",
        "| task | seed | images | a fifth: champion, bytes | test % | five folds: champion, bytes |"
        " test % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for once, folds in pairs:
        cells = [f"{each['champion']['bytes']:,} | {percent(each['champion']):.1f}"
                 for each in (once, folds)]  # fmt: skip
        lines.append(
            f"| {once['task']} | {once['seed']} | {folds['validation_images']} |"
            f" {' | '.join(cells)} |"
        )
    origins = dict.fromkeys(row["origin"] for row in rows)
    return "\n".join([*lines, "", *origins]) + "\n"


def _pairs(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], ...]]:
    found: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["task"], row["seed"], row["epochs"]][row["validation"]] = row
    return [
        tuple(pair[name] for name in VALIDATIONS)
        for pair in found.values()
        if len(pair) == len(VALIDATIONS)
    ]


def main() -> None:
    """Measure what is missing; write the results after each study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(PER_CLASS), choices=PER_CLASS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of the data")
    parser.add_argument("--workdir", type=Path, default=HERE.parent / "runs" / "folds")
    parser.add_argument("--page", action="store_true", help="write the page from what is there")
    options = parser.parse_args()
    options.shared, options.workdir = options.shared.resolve(), options.workdir.resolve()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for seed, task, validation in itertools.product(options.seeds, options.tasks, VALIDATIONS):
        named = {"task": task, "seed": seed, "epochs": options.epochs, "validation": validation}
        if options.page or any(named.items() <= row.items() for row in rows):
            continue
        machine = describe_machine()
        command = shlex.join(["python", "benchmarks/folds.py", *sys.argv[1:]])
        origin = {"origin": f"`{command}` on {machine['cpu']}, commit {machine['commit']}."}
        rows.append({**named, **measure(open_cell(task, seed, validation, options)), **origin})
        RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(rows))


if __name__ == "__main__":
    main()
