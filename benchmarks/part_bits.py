"""Bits for each part by its sensitivity, against the same bits for all parts.

    python benchmarks/part_bits.py [--tasks mnist dtd10] [--variants ...] [--seeds 0 1 2]
                                   [--epochs 6] [--shared FOLDER]
    python benchmarks/part_bits.py --page     write the page from what has been measured

A recipe of four parts is trained with 32 bits on the training images. A part's sensitivity at a
number of bits is what rounding it alone adds to the cross-entropy on the validation images. *By
sensitivity* is the choice of 1, 2 or 4 bits for each part whose sensitivities have the smallest sum
among those whose pack is no larger than that of 2 or 4 bits for all. Each recipe is then trained
with its bits, on train and validation together, and the reloaded pack is tested once.

The embedded backbone at 32 px, on the first images up to a limit. Interrupt it and start it again:
finished runs are kept. Writes benchmarks/results/part_bits.json and .md.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from image_tasks import opened_run
from pages import mean_difference
from runs import (
    Place,
    Run,
    by_task,
    figures,
    measure_missing,
    paired,
    parse_arguments,
    percent,
    points_of,
    train,
)

from pipeline.adaptation import AdaptedModel, attach
from pipeline.adaptation.packing import SizePlanner
from pipeline.adaptation.quantiser import quantise
from pipeline.specs import Bits
from pipeline.training import Inputs
from pipeline.training.evaluate import evaluate
from pipeline.training.fit import fit

RESULTS = Path(__file__).parent / "results" / "part_bits.json"
TASKS = ("mnist", "dtd10", "cifar10")
SIZE_PX, LIMIT = 32, 400
PARTS: dict[str, dict[str, Any]] = {"adapter": {"width": 4}, "biases": {}, "norms": {}, "head": {}}
CHOICES: tuple[Bits, ...] = (1, 2, 4)
PartBits = dict[str, Bits]
UNIFORM: dict[str, PartBits] = {f"{bits} for all": dict.fromkeys(PARTS, bits) for bits in CHOICES}
BY_SENSITIVITY = {"by sensitivity, up to 2": "2 for all", "by sensitivity, up to 4": "4 for all"}
VARIANTS = (*UNIFORM, *BY_SENSITIVITY)


def recipe_of(bits: Mapping[str, int], epochs: int) -> dict[str, Any]:
    """The recipe with these bits."""
    parts = {name: {**settings, "bits": bits[name]} for name, settings in PARTS.items()}
    return {**parts, "training": {"epochs": epochs}}


def open_task(run: Run, place: Place, bits: Mapping[str, int]) -> Inputs:
    """The task with the recipe of these bits."""
    limited = {**run, "limit": LIMIT}
    return opened_run(limited, place, recipe_of(bits, run["epochs"]), SIZE_PX)


def trained(inputs: Inputs) -> AdaptedModel:
    """The model after training on the training images, as a trial trains it."""
    recipe, seed = inputs.task.recipe, inputs.task.seed
    model = attach(inputs.backbone, recipe, len(inputs.index.classes), seed=seed)
    train(model, inputs, recipe, seed)
    return model


@torch.no_grad()
def sensitivities(model: AdaptedModel, inputs: Inputs) -> dict[tuple[str, Bits], float]:
    """What rounding each part alone to each number of bits adds to the validation loss."""

    def loss() -> float:
        outcomes = evaluate(model, inputs.reader("val"), inputs.splits["val"], inputs.kind)
        logits, targets = map(torch.from_numpy, (outcomes.outputs, outcomes.targets))
        return float(torch.nn.functional.cross_entropy(logits, targets.long()))

    before, found = loss(), dict[tuple[str, Bits], float]()
    kept = [group.latent_N.clone() for group in model.values.groups()]
    for part, bits in itertools.product(PARTS, CHOICES):
        for group in model.values.groups():
            pieces = group.latent_N.split([tensor.values for tensor in group.tensors])
            for tensor, piece in zip(group.tensors, pieces, strict=True):
                if tensor.part == part:
                    piece.copy_(quantise(piece, torch.tensor([len(piece)]), bits))
        found[part, bits] = loss() - before
        for group, values in zip(model.values.groups(), kept, strict=True):
            group.latent_N.copy_(values)
    return found


def chosen_bits(
    inputs: Inputs, sensitivity: Mapping[tuple[str, Bits], float], within: PartBits
) -> PartBits:
    """The bits of the smallest sum of sensitivities whose pack is no larger than another's."""
    task = inputs.task
    planner = SizePlanner(task, inputs.backbone, inputs.index.classes)

    def size(bits: PartBits) -> int:
        written = recipe_of(bits, task.recipe.training.epochs)
        return planner.size_bytes(type(task.recipe).model_validate(written))

    every: Iterator[PartBits] = (
        dict(zip(PARTS, bits, strict=True))
        for bits in itertools.product(CHOICES, repeat=len(PARTS))
    )
    limit = size(within)
    fitting = [bits for bits in every if size(bits) <= limit]
    return min(fitting, key=lambda bits: sum(sensitivity[each] for each in bits.items()))


def measure(run: Run, place: Place) -> Run:
    """One fit, for which the bits are chosen first."""
    bits = UNIFORM.get(run["variant"])
    if bits is None:
        exact = open_task(run, place, dict.fromkeys(PARTS, 32))
        found = sensitivities(trained(exact), exact)
        bits = chosen_bits(exact, found, UNIFORM[BY_SENSITIVITY[run["variant"]]])
    inputs = open_task(run, place, bits)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(inputs, inputs.task.recipe, None, Path(folder) / "fit", device=place.device)
    return {**run, "bits": bits, "images": len(inputs.splits["trainval"]), **figures(result)}


def page(runs: Sequence[Run]) -> str:
    """A table per task, and the differences over all."""
    lines = [
        "# Bits by sensitivity",
        "",
        f"The embedded backbone at {SIZE_PX} px; a bottleneck of width 4, biases, norms and the",
        "head. *By sensitivity* chooses 1, 2 or 4 bits for each part so that rounding them one by",
        "one adds least to the validation loss, in a pack no larger than that of 2 or 4 bits for",
        "all. Test accuracy in percent is that of reloaded packs, the mean over the seeds;",
        "differences are paired by task and seed, ± their standard error.",
        "",
        "| bits | against | points of test accuracy | bytes | pairs |",
        "|---|---|---|---|---|",
        *(
            line
            for name, other in BY_SENSITIVITY.items()
            for line in _difference(runs, name, other)
        ),
        *_difference(runs, "by sensitivity, up to 4", "2 for all"),
        *_difference(runs, "2 for all", "1 for all"),
        *by_task(runs, TASKS, _rows),
    ]
    return "\n".join(lines) + "\n"


def _difference(runs: Sequence[Run], name: str, other: str) -> list[str]:
    """The row of one variant against another."""
    pairs = paired(runs, name, other)
    if len(pairs) < 2:
        return []
    size = fmean(run["bytes"] / against["bytes"] for run, against in pairs)
    return [
        f"| {name} | {other} | {mean_difference(points_of(pairs))} | {size:.2f} | {len(pairs)} |"
    ]


def _rows(runs: Sequence[Run]) -> list[str]:
    lines = [
        "| bits | bytes | test % | adapter, biases, norms, head, by seed | seeds |",
        "|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        if own := [run for run in runs if run["variant"] == variant]:
            size, mean = fmean(run["bytes"] for run in own), fmean(map(percent, own))
            bits = "; ".join(
                dict.fromkeys(", ".join(str(run["bits"][part]) for part in PARTS) for run in own)
            )
            lines.append(f"| {variant} | {size:,.0f} | {mean:.1f} | {bits} | {len(own)} |")
    return lines


def main() -> None:
    """Measure what is missing, write the page."""
    arguments = parse_arguments(__doc__, TASKS, "variant", VARIANTS, (0, 1, 2))
    runs = measure_missing(RESULTS, arguments, "variant", lambda runs, place: None, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
