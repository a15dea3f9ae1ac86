"""What the documented differences from the papers' code cost: see docs/fidelity.md.

    python benchmarks/choices.py [--only selections accuracy schedule codebook]

Trains GPS's recipe (K = 1, 32 bits) on the ViT-S twice, in bfloat16 and in float32, and tests each
pair of choices on the same images. Few epochs, one seed: large effects would show, small ones would
not. Of choices in the selection it says how many connections they change. Needs the data and the
backbones beside the project. Writes results/choices.json and .md.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any
from unittest import mock

import numpy as np
import torch
from fidelity import open_task
from machine import describe_machine
from numpy.typing import NDArray
from PIL import Image
from runs import SHARED, Place

from pipeline.adaptation import AdaptedModel, attach, rank_indices, recompute
from pipeline.adaptation.selected.ranking import kept_indices
from pipeline.data.batch_plan import shard_batches
from pipeline.data.decode import decode_image
from pipeline.packs.codebook import levels
from pipeline.selection.gradient import gradient_sums
from pipeline.selection.losses import make_loss
from pipeline.training.loop import learning_rate_factor, train_epochs

RESULTS = Path(__file__).parent / "results" / "choices.json"
CROP_SHARE = 0.9
"""Share of the short side that timm's evaluation transform keeps for GPS's checkpoint."""
EPOCHS, BATCH = 2, 32


def squeezed(path: Path, size_px: int) -> NDArray[np.uint8]:
    """As here: the whole image, its sides made equal."""
    return decode_image(path, size_px)


def cropped(path: Path, size_px: int) -> NDArray[np.uint8]:
    """As timm's evaluation transform: the middle of the image, its sides kept."""
    with Image.open(path) as image:
        side = min(image.size) * CROP_SHARE
        left, top = ((length - side) / 2 for length in image.size)
        box = tuple(round(edge) for edge in (left, top, left + side, top + side))
        return decode_image(image.convert("RGB").crop(box), size_px)  # type: ignore[arg-type]


@torch.inference_mode()
def hits(model: AdaptedModel, classes: list[str], decode: Callable[..., Any]) -> torch.Tensor:
    """Which test images [N] are classified rightly, in float32."""
    root = SHARED / "data" / "dtd10"
    with (root / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = np.stack([decode(root / row["path"], 98) for row in rows])
    labels = torch.tensor([classes.index(row["label"]) for row in rows])
    model.eval()
    guesses = [model(chunk).argmax(dim=1) for chunk in torch.from_numpy(images).split(BATCH)]
    return torch.cat(guesses) == labels


def trained(dtype: torch.dtype, workdir: Path) -> tuple[AdaptedModel, list[str], float]:
    """Train GPS's recipe in `dtype`, even without units for it; the classes and CPU seconds too."""
    inputs = open_task("dtd10", {"criterion": "magnitude"}, Place(SHARED, workdir, "cpu"))
    recipe = inputs.task.recipe
    spec = recipe.training.changed(epochs=EPOCHS, batch_size=BATCH)
    selected = recompute(inputs.backbone, inputs.task.selection, 1)
    classes = list(inputs.index.classes)
    model = attach(inputs.backbone, recipe, len(classes), selected=selected)
    reader, split = inputs.reader("trainval"), inputs.splits["trainval"]
    start = time.process_time()
    with mock.patch("pipeline.training.loop.computing_dtype", return_value=dtype):
        for _ in train_epochs(model, reader, split, spec, inputs.kind, seed=0, flip=True):
            pass
    return model, classes, time.process_time() - start


def paired(first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """Accuracies of two choices in percent, their difference and its standard error."""
    difference = first.double() - second.double()
    return {
        "first": 100 * float(first.double().mean()),
        "second": 100 * float(second.double().mean()),
        "difference": 100 * float(difference.mean()),
        "stderr": 100 * float(difference.std()) / math.sqrt(len(difference)),
    }


def accuracies(workdir: Path) -> dict[str, dict[str, float]]:
    """bfloat16 against float32, and squeezed against cropped test images of the latter."""
    model, classes, seconds = trained(torch.float32, workdir)
    exact = hits(model, classes, squeezed)
    crop = paired(exact, hits(model, classes, cropped))
    model, classes, low_seconds = trained(torch.bfloat16, workdir)
    precision = paired(hits(model, classes, squeezed), exact)
    return {"precision": precision | {"cpu_seconds": seconds + low_seconds}, "crop": crop}


def selections(workdir: Path) -> dict[str, float]:
    """Overlap of the connections selected at K = 1 under two choices, and under two seeds.

    The gradients of the training images and of the validation images are summed apart, and so are
    those of full batches and of the last, smaller one.
    """
    inputs = open_task("dtd10", {}, Place(SHARED, workdir, "cpu"))
    task, spec = inputs.task, inputs.task.selection
    loss = make_loss(spec, inputs.kind, inputs.backbone, len(inputs.index.classes), task.seed)

    def sums(split: str, seed: int, sizes: Callable[[int], bool]) -> dict[str, torch.Tensor]:
        batches = enumerate(shard_batches(inputs.splits[split], spec.batch_size, seed=seed))
        chosen = [(number, samples) for number, samples in batches if sizes(len(samples))]
        read = inputs.reader(split).batches([samples for _, samples in chosen])
        numbered = [(number, *pair) for (number, _), pair in zip(chosen, read, strict=True)]
        return gradient_sums(inputs.backbone, numbered, spec, loss, seed=seed, flip=task.input.flip)

    full = sums("train", 0, lambda size: size == spec.batch_size)
    last = sums("train", 0, lambda size: size < spec.batch_size)
    last_size = len(inputs.splits["train"]) % spec.batch_size
    validation = sums("val", 0, lambda size: True)
    other_seed = sums("train", 1, lambda size: True)
    ours = {name: full[name] + last[name] for name in full}
    with_validation = {name: ours[name] + validation[name] for name in ours}
    weighted = {name: full[name] + last_size / spec.batch_size * last[name] for name in full}
    return {
        "validation": overlap(ours, with_validation),
        "weighted": overlap(ours, weighted),
        "seeds": overlap(ours, other_seed),
        "last_size": last_size,
        "batch_size": spec.batch_size,
    }


def overlap(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Fraction of the connections at K = 1 per neuron that two sums of gradients have in common."""
    ranked = [rank_indices(sums, "neuron", 1) for sums in (first, second)]
    places = [kept_indices(each, 1) for each in ranked]
    common = sum(int(torch.isin(places[0][name], places[1][name]).sum()) for name in places[0])
    return common / sum(len(index_N) for index_N in places[0].values())


def schedule() -> dict[str, float]:
    """This schedule by step against timm's by epoch with its cool-down, on 100 epochs of 25 steps.

    timm's cosine counts from the first epoch, not from the end of the warm-up.
    """
    epochs, warmup, steps = 100, 10, 25
    ours = [
        learning_rate_factor(step, epochs * steps, warmup * steps) for step in range(epochs * steps)
    ]
    cosine = [0.5 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs)]
    theirs = [epoch / warmup if epoch < warmup else cosine[epoch] for epoch in range(epochs)]
    by_step = [rate for rate in theirs for _ in range(steps)]
    pairs = list(zip(ours, by_step, strict=True))
    return {
        "largest_difference": max(abs(one - other) for one, other in pairs),
        "sum_ratio": sum(ours) / sum(by_step),
    }


def codebook() -> dict[str, float]:
    """Mean error of 8-bit codes of a standard normal: 500 rounds of alternation against the
    optimum.
    """
    normal, level_N = NormalDist(), np.zeros(256)
    cdf, inverse = np.vectorize(normal.cdf), np.vectorize(normal.inv_cdf)
    for _ in range(500):
        edges = (level_N[1:] + level_N[:-1]) / 2
        tail = np.concatenate([[0.0], cdf(edges), [1.0]])
        level_N = inverse((tail[1:] + tail[:-1]) / 2)
    z = np.random.default_rng(0).standard_normal(1_000_000)

    def error(book: NDArray[Any]) -> float:
        codes = np.searchsorted((book[1:] + book[:-1]) / 2, z)
        return float(np.abs(book[codes] - z).mean())

    best = levels(8).astype(np.float64)
    return {
        "theirs": error(level_N),
        "ours": error(best),
        "theirs_outermost": level_N[-1],
        "ours_outermost": best[-1],
    }


def page(result: dict[str, Any]) -> str:
    """The tables of a result."""
    machine, rates, book = result["machine"], result["schedule"], result["codebook"]
    commits = ", ".join(f"{name} {commit}" for name, commit in sorted(result["commits"].items()))
    names = {
        "precision": ("bfloat16 stream", "float32"),
        "crop": ("squeezed to a square", "middle square, 90 % of the short side"),
    }
    rows = "\n".join(
        "| {} | {} | {first:.1f} | {second:.1f} | {difference:+.1f} ± {stderr:.1f} |".format(
            *names[key], **result["accuracy"][key]
        )
        for key in names
    )
    return f"""# Choices that differ from the papers' code

`python benchmarks/choices.py` on {machine["cpu"]}, torch {machine["torch"]}. Commits: {commits}.

## Accuracy

GPS's recipe on ten classes of DTD, ViT-S at 98 px, {EPOCHS} epochs, one seed, connections by
magnitude; 700 test images. Differences are paired by image, with their standard error, so they say
nothing of effects below some two points. Both kinds of test images meet the model that was trained
on squeezed ones.

| here | their code | accuracy here | theirs | difference |
|---|---|---|---|---|
{rows}

{selection_text(result["selections"])}
## Schedule and codebook

Learning rates as fractions of the peak, 100 epochs with 10 of warm-up, by step here and by epoch in
their code: at most {rates["largest_difference"]:.3f} apart; the sum over all steps is
{rates["sum_ratio"]:.3f} times theirs, whose 10 cool-down epochs have next to none.

Codebook at 8 bits, mean error of a standard normal: {book["ours"]:.5f} here, outermost level
{book["ours_outermost"]:.2f}; {book["theirs"]:.5f} after their 500 rounds, outermost level
{book["theirs_outermost"]:.2f}.
"""


def selection_text(overlaps: dict[str, float]) -> str:
    """The section on selections."""
    sizes = "the last batch of {last_size:.0f} counts as much as one of {batch_size:.0f}"
    return f"""## Selection

Fraction of the selected connections (K = 1 per neuron, GPS's views) that two choices have in
common, on the same task. Two seeds of one choice show how much of a difference is chance.

| here | their code | in common |
|---|---|---:|
| train alone | train and validation | {overlaps["validation"]:.3f} |
| {sizes.format(**overlaps)} | weighted by its size | {overlaps["weighted"]:.3f} |
| seed 0 | seed 1 | {overlaps["seeds"]:.3f} |
"""


def main() -> None:
    """Measure all, or what is asked for, and write the page."""
    measures: dict[str, Callable[[Path], Any]] = {
        "schedule": lambda folder: schedule(),
        "codebook": lambda folder: codebook(),
        "selections": selections,
        "accuracy": accuracies,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=measures, default=list(measures))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    result["machine"] = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            result[name] = measures[name](Path(folder))
            result.setdefault("commits", {})[name] = result["machine"]["commit"]
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
