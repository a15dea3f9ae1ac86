"""By which loss to select connections for segmentation: pixel cross-entropy against a contrastive
loss over regions, magnitude and chance.

    python benchmarks/segmentation_selections.py [--variants ...] [--seeds 0 1 2] [--epochs 8]
                                                 [--samples 128] [--workers 1]
    python benchmarks/segmentation_selections.py --page    write the page from what is measured

The drawn shapes of tasks/segmentation/shapes.yaml, cut to `--samples` training images, on the
demo's backbone. Every run trains one connection per neuron and the head, at 32 bits and at one
learning rate, on train and validation, and its reloaded pack reads the test set once. Runs of a
seed differ in the selection alone.

The contrastive loss is that of classification, over regions: the mean feature of each class's
places in each view, where its mask covers the area of at least one place; regions of a class are
alike. The product does not have it.

Interrupt it and start it again: finished runs are kept. Writes
benchmarks/results/segmentation_selections.json and .md.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from pages import mean_difference, table
from runs import Place, Run, measure_missing, origins, parse_arguments, with_seed

from pipeline.adaptation import SelectedIndex, rank_indices
from pipeline.data import prepare, shard_batches
from pipeline.kinds import IGNORED
from pipeline.selection import (
    read_selection,
    select_locally,
    supervised_contrastive_loss,
    write_selection,
)
from pipeline.selection.gradient import gradient_sums
from pipeline.specs import Recipe, Selection
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, open_inputs
from pipeline.training.fit import fit

RESULTS = Path(__file__).parent / "results" / "segmentation_selections.json"
TASK = Path(__file__).parent.parent / "tasks" / "segmentation" / "shapes.yaml"
HEAD, REFERENCE, REGIONS = "head alone", "pixel cross-entropy", "contrastive, regions"
SELECTIONS: dict[str, dict[str, Any]] = {
    REFERENCE: {"loss": "cross_entropy"},
    REGIONS: {"loss": "cross_entropy"},
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random"},
}
"""Settings of each selection; that over regions takes views and batches from its own."""
VARIANTS = (HEAD, *SELECTIONS)
TEMPERATURE, BATCH = 0.07, 8


def open_task(run: Run, place: Place) -> Inputs:
    """The task of a run, prepared, with the settings of its selection."""
    task = load_task(TASK)
    data = task.data.model_copy(update={"train_samples": run["samples"]})
    selection = Selection.model_validate(SELECTIONS.get(run["variant"], {"loss": "cross_entropy"}))
    task = task.model_copy(update={"data": data, "selection": selection})
    folder = place.workdir / f"shapes-{run['samples']}"
    prepare(task, folder)
    return open_inputs(task, folder)


def select_once(run: Run, place: Place) -> SelectedIndex:
    """The selection of a run, kept in a file: seeds share it."""
    path = place.workdir / f"{run['samples']} {run['variant']}.safetensors"
    if not path.exists():
        select = regions_selection if run["variant"] == REGIONS else select_one_each
        write_selection(select(open_task(run, place)), path)
    return read_selection(path)


def select_one_each(inputs: Inputs) -> SelectedIndex:
    """The product's selection of one connection per neuron."""
    return select_locally(inputs, 1)


def regions_selection(inputs: Inputs) -> SelectedIndex:
    """The same by the gradient of the contrastive loss over regions."""
    spec, seed, split = inputs.task.selection, inputs.task.seed, inputs.splits["train"]
    batches = shard_batches(split, spec.batch_size, seed=seed)
    numbered = (
        (number, *pair) for number, pair in enumerate(inputs.reader("train").batches(batches))
    )
    loss = regions_loss(len(inputs.index.classes))
    sums = gradient_sums(
        inputs.backbone,
        numbered,
        spec,
        lambda model: loss,
        seed=seed,
        flip=inputs.task.input.flip,
    )
    return rank_indices(sums, spec.level, 1)


def regions_loss(class_count: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The contrastive loss of features [N, D, h, w] and masks [N, S, S] over regions."""

    def loss(features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        known = masks.long().where(masks != IGNORED, torch.tensor(class_count))
        one_hot = F.one_hot(known, class_count + 1)[..., :class_count].movedim(-1, 1).float()
        share_NChw = F.adaptive_avg_pool2d(one_hot, (features.shape[2], features.shape[3]))
        places_NC = share_NChw.sum(dim=(2, 3))
        pooled_NCD = torch.einsum("nchw,ndhw->ncd", share_NChw, features)
        number, class_M = (places_NC >= 1).nonzero(as_tuple=True)
        pooled_MD = pooled_NCD[number, class_M] / places_NC[number, class_M, None]
        return supervised_contrastive_loss(pooled_MD, class_M, TEMPERATURE)

    return loss


def measure(run: Run, place: Place) -> Run:
    """One run from training to the tested pack."""
    inputs = with_seed(open_task(run, place), run["seed"])
    has_none = run["variant"] == HEAD
    parts = {"preset": "linear"} if has_none else {"connections": {"top_k": 1, "bits": 32}}
    training = inputs.task.recipe.training.changed(epochs=run["epochs"], batch_size=BATCH)
    recipe = Recipe.model_validate(
        {
            **parts,
            "head": {"bits": 32},
            "training": training.model_dump(exclude_unset=True),
        }
    )
    selected = None if has_none else select_once(run, place)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(inputs, recipe, selected, Path(folder))
    return {
        **run,
        "test": result.test_metric,
        "stderr": result.test_metric_stderr,
        "metric": result.metric,
        "bytes": result.size_bytes,
        "seconds": result.train_seconds,
    }


def select_all(runs: Sequence[Run], place: Place) -> None:
    """Make the selections of all runs first."""
    for run in {run["variant"]: run for run in runs if run["variant"] != HEAD}.values():
        select_once(run, place)


def page(runs: Sequence[Run]) -> str:
    """A row per selection: its mean over the seeds, and its difference to the reference."""
    first, error = runs[0], 100 * max(run["stderr"] for run in runs)
    text = (
        f"Drawn shapes, {first['samples']} training images, {first['epochs']} epochs of batches of"
        f" {BATCH}, one connection per neuron and the head at 32 bits; one learning rate for all,"
        f" nothing tuned. Test {first['metric']} in percent, mean over the seeds in brackets. One"
        f" seed's value has a standard error of at most {error:.1f} points over the test images,"
        " which all runs share; differences are paired by seed, with their standard error over the"
        " seeds."
    )
    lines = ["# Selections for segmentation", "", origins(runs), "", *textwrap.wrap(text, 100), ""]
    columns = ("selection", first["metric"], f"difference to {REFERENCE}", "bytes")
    rows = [_row(runs, variant) for variant in VARIANTS if _by_seed(runs, variant)]
    return "\n".join([*lines, *table(columns, rows)]) + "\n"


def _by_seed(runs: Sequence[Run], variant: str) -> dict[int, Run]:
    return {run["seed"]: run for run in runs if run["variant"] == variant}


def _row(runs: Sequence[Run], variant: str) -> tuple[str, ...]:
    own, others = _by_seed(runs, variant), _by_seed(runs, REFERENCE)
    points = [100 * run["test"] for run in own.values()]
    differences = [
        100 * (own[seed]["test"] - others[seed]["test"]) for seed in own.keys() & others.keys()
    ]
    shown = f"{fmean(points):.1f} ({len(points)})"
    if variant == REFERENCE or len(differences) < 2:
        return variant, shown, "", f"{next(iter(own.values()))['bytes']:,}"
    return variant, shown, mean_difference(differences), f"{next(iter(own.values()))['bytes']:,}"


def main() -> None:
    """Measure what is missing, write the page."""
    counts = {"samples": 128}
    arguments = parse_arguments(__doc__, ("shapes",), "variant", VARIANTS, (0, 1, 2), counts)
    runs = measure_missing(RESULTS, arguments, "variant", select_all, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
