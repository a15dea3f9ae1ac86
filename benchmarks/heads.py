"""What a head on a fixed subspace of the feature costs in accuracy, against the whole head at few
bits, on a frozen ViT-S.

    python benchmarks/heads.py [--tasks dtd10 caltech47 caltech101] [--heads ...] [--seeds 0 1 2]
                               [--epochs 8] [--shared FOLDER]
    python benchmarks/heads.py --page     write the page from what has been measured

caltech47 is the first 47 classes of caltech101.

Nothing but the head trains, so the features of every image are computed once, and the product's
loop trains on them, in float32 and without augmentation, on train and validation together. The test
set is read once, by the head of the reloaded pack. All runs of a task share data, splits and
learning rate; nothing is tuned.

Interrupt it and start it again: finished runs are kept. Needs the data and the backbones, by
default in the folder `shared` beside the project, but neither Ray nor MLflow. Writes
benchmarks/results/heads.json and .md.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from fidelity import open_task
from runs import Place, Run, by_task, measure_missing, parse_arguments, with_seed
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.adaptation import AdaptedModel, attach
from pipeline.adaptation.packing import describe, from_pack, to_pack
from pipeline.data import evaluation_batches, prepare
from pipeline.inputs.learning_rate import with_learning_rate
from pipeline.packs import ledger, pack_to_bytes, read_pack
from pipeline.search.pareto import on_front
from pipeline.specs import Recipe
from pipeline.training import Inputs, open_inputs, train_epochs
from pipeline.utils.devices import exact_float32

RESULTS = Path(__file__).parent / "results" / "heads.json"
TASKS = ("dtd10", "caltech47", "caltech101")
BITS = (1, 2, 4)
RANKS = (16, 32, 64, 128, 256)
SPLITS = ("trainval", "test")
HEADS: dict[str, dict[str, Any]] = {
    **{f"whole, {bits} bits": {"bits": bits} for bits in BITS},
    **{
        f"rank {rank}, {bits} bits": {"bits": bits, "rank": rank} for rank in RANKS for bits in BITS
    },
}


def caltech47(place: Place) -> dict[str, Any]:
    """The data of the first 47 classes of caltech101, as lists of its files."""
    whole, root = place.shared / "data" / "caltech101", place.workdir / "caltech47"
    root.mkdir(parents=True, exist_ok=True)
    names = (whole / "classes.txt").read_text().splitlines()[:47]
    for file in ("train800.txt", "val200.txt", "test.txt"):
        rows = [line.rsplit(" ", 1) for line in (whole / file).read_text().splitlines()]
        chosen = [f"{whole / path} {label}" for path, label in rows if int(label) < len(names)]
        (root / file).write_text("\n".join(chosen) + "\n")
    return {"format": "lists", "root": str(root), "classes": names}


def open_any(name: str, place: Place) -> Inputs:
    """The prepared task."""
    if name != "caltech47":
        return open_task(name, {}, place)
    spec = open_task("caltech101", {}, place).task
    task, folder = spec.changed(name=name, data=caltech47(place)), place.workdir / name / "data"
    prepare(task, folder)
    return open_inputs(task, folder)


class Features:
    """A reader of a split's features in the place of its images: float32 [B, D] and targets [B]."""

    def __init__(self, samples: np.ndarray, features: torch.Tensor, targets: torch.Tensor) -> None:
        self._rows = {tuple(sample): row for row, sample in enumerate(samples.tolist())}
        self._features, self._targets = features, targets

    def window(self, numbers: Iterable[int] | None = None) -> None:
        """Everything is in memory: shards are mixed without a limit."""

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The features and targets of each batch of a plan."""
        for samples in plan:
            rows = [self._rows[tuple(sample)] for sample in samples.tolist()]
            yield self._features[rows], self._targets[rows]


def features_file(task: str, place: Place) -> Path:
    """Where a task's features are kept."""
    return place.workdir / f"{task}-features.safetensors"


@exact_float32()
@torch.inference_mode()
def compute_features(inputs: Inputs, path: Path) -> None:
    """Write the pooled features of every image to a file, split by split."""
    linear = attach(inputs.backbone, Recipe(), len(inputs.index.classes))
    tensors: dict[str, torch.Tensor] = {}
    for split in SPLITS:
        plan = evaluation_batches(inputs.splits[split], 64)
        read = [
            (linear.backbone(linear.normalise(images)), targets)
            for images, targets in inputs.reader(split).batches(plan)
        ]
        tensors[f"{split}.features"] = torch.cat([features for features, _ in read])
        tensors[f"{split}.targets"] = torch.cat([targets for _, targets in read])
        tensors[f"{split}.samples"] = torch.from_numpy(np.concatenate(plan))
    save_file(tensors, path)


def read_features(path: Path, split: str) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Samples [N, 2], features [N, D] and targets [N] of a split."""
    tensors = load_file(path)
    samples, features, targets = (
        tensors[f"{split}.{name}"] for name in ("samples", "features", "targets")
    )
    return samples.numpy(), features, targets


def train_head(inputs: Inputs, recipe: Recipe, reader: Features) -> AdaptedModel:
    """The adapted model whose head was trained on features as `fit` would on their images."""
    classes, seed = len(inputs.index.classes), inputs.task.seed
    model, trained = (attach(inputs.backbone, recipe, classes, seed=seed) for _ in range(2))
    trained.backbone, trained.normalise = nn.Identity(), nn.Identity()
    for _ in train_epochs(
        trained,
        reader,  # type: ignore[arg-type]
        inputs.splits["trainval"],
        recipe.training,
        inputs.kind,
        seed=seed,
        flip=False,
    ):
        pass
    model.values.load_state_dict(trained.values.state_dict())
    return model


def measure(run: Run, place: Place) -> Run:
    """One head from training to the tested pack."""
    inputs = with_seed(open_any(run["task"], place), run["seed"])
    training = {"epochs": run["epochs"], "precision": "fp32"}
    written = {"preset": "linear", "head": HEADS[run["head"]], "training": training}
    recipe = with_learning_rate(Recipe.model_validate(written), inputs.backbone)
    path, began = features_file(run["task"], place), time.monotonic()
    model = train_head(inputs, recipe, Features(*read_features(path, "trainval")))
    seconds = time.monotonic() - began
    metadata = describe(inputs.task, recipe, inputs.backbone, inputs.index.classes)
    content = pack_to_bytes(to_pack(model, metadata))
    pack = read_pack(content)
    reloaded = from_pack(pack, inputs.backbone)
    reloaded.merge()
    _, features, targets = read_features(path, "test")
    with torch.inference_mode():
        correct = int((reloaded.head(features).argmax(dim=1) == targets).sum())
    return {
        **run,
        "correct": correct,
        "samples": len(targets),
        "bytes": len(content),
        "head_bytes": ledger(pack)["head"],
        "seconds": round(seconds, 1),
    }


def compute_all(runs: Sequence[Run], place: Place) -> None:
    """Compute the features of all tasks that have none."""
    torch.set_num_threads(1)
    for task in {run["task"]: None for run in runs}:
        inputs = open_any(task, place)
        if not (path := features_file(task, place)).exists():
            compute_features(inputs, path)


def page(runs: Sequence[Run]) -> str:
    """A table per task, by size: mean test accuracy over the seeds, and what is on the front."""
    lines = [
        "# Heads on a subspace",
        "",
        "The head alone, on `vit_small_patch14_dinov2` at 98 px, further trained by others on",
        "saliency, whose feature has 384 numbers. A head of rank R is trained on a fixed",
        "projection of the feature to R numbers. Test accuracy in percent is that of the reloaded",
        "pack, mean over the seeds, with their range. A star marks heads that no smaller one",
        "beats.",
        *by_task(runs, TASKS, _rows),
    ]
    return "\n".join(lines) + "\n"


def _rows(runs: Sequence[Run]) -> list[str]:
    found = []
    for name in {run["head"]: None for run in runs}:
        own = [run for run in runs if run["head"] == name]
        accuracies = [100 * run["correct"] / run["samples"] for run in own]
        found.append((own[0]["head_bytes"], own[0]["bytes"], accuracies, name))
    found.sort()
    front = on_front([row[0] for row in found], [fmean(row[2]) for row in found])
    lines = ["| head | its bytes | pack's bytes | test % | range | seeds |"]
    lines += ["|---|---|---|---|---|---|"]
    for number, (head, pack, values, name) in enumerate(found):
        star = " *" if number in front else ""
        spread = f"{min(values):.1f}-{max(values):.1f}"
        lines.append(
            f"| {name}{star} | {head:,} | {pack:,} | {fmean(values):.1f} | {spread} |"
            f" {len(values)} |"
        )
    return lines


def main() -> None:
    """Measure what is missing, write the page."""
    arguments = parse_arguments(__doc__, TASKS, "head", HEADS, (0, 1, 2))
    runs = measure_missing(RESULTS, arguments, "head", compute_all, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
