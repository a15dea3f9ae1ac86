"""Whether training towards skewed codes and coding their entropy makes better packs: a penalty on
the bits that an ideal coder would need, against the same recipes without it.

    python benchmarks/rate_aware.py [--tasks mnist dtd10 trashnet] [--variants ...] [--seeds 0 1]
                                    [--epochs 8] [--limit 800] [--workers 2] [--shared FOLDER]
    python benchmarks/rate_aware.py --page     write the page from what has been measured

The loss gets `weight` times the mean number of bits per value, by the entropy of each tensor's
codes; so that it has a gradient, a value belongs to all levels, most to the nearest (Agustsson et
al., arXiv 1704.00648). The embedded backbone at 32 px, on the tasks' first images up to a limit;
the packs are trained on training and validation images together, and the reloaded pack is tested
once. Bytes are those of the file if an ideal coder that learns each tensor's frequencies had
written its codes, as in benchmarks/codes.py: no coder of single codes does better.

Interrupt it and start it again: finished runs are kept. Writes benchmarks/results/rate_aware.json
and .md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from codes import row_of
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
)

from pipeline.adaptation import AdaptedModel, SelectedIndex
from pipeline.adaptation.part import AuxiliaryTerm
from pipeline.adaptation.values import FlatValues
from pipeline.packs import read_pack
from pipeline.packs.codebook import MAX_CODE_BITS, levels
from pipeline.specs import Recipe
from pipeline.training import Inputs
from pipeline.training.fit import PACK_FILE, fit

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rate_aware.json"
TASKS = ("mnist", "dtd10", "trashnet")
SIZE_PX, LIMIT = 32, 800
SHARPNESS = 10.0
"""Of the soft assignment to levels: the logits are this times the negative squared distance."""
BASE = "2 bits, w=8"
VARIANTS: dict[str, tuple[int, int, float]] = {
    "1 bit, w=8": (1, 8, 0.0),
    "1 bit, w=16": (1, 16, 0.0),
    BASE: (2, 8, 0.0),
    **{f"2 bits, w=8, weight {weight}": (2, 8, weight) for weight in (0.01, 0.1, 0.3, 1.0)},
    "4 bits, w=8": (4, 8, 0.0),
    **{f"4 bits, w=8, weight {weight}": (4, 8, weight) for weight in (0.1, 0.3, 1.0)},
}
"""Bits of all values, the bottleneck's width, the weight of the penalty."""


class RateTerm(AuxiliaryTerm):
    """The mean number of bits per value, times a weight."""

    def __init__(self, groups: Sequence[FlatValues], weight: float) -> None:
        super().__init__()
        self._groups = tuple(group for group in groups if group.bits <= MAX_CODE_BITS)
        self._weight = weight

    def begin_pass(self) -> None:
        """It keeps nothing of a pass."""

    def loss(self) -> torch.Tensor:
        """The weighted entropy of the codes."""
        pieces = [
            (group, piece)
            for group in self._groups
            for piece in group.latent_N.split([tensor.values for tensor in group.tensors])
        ]
        bits = sum(len(piece) * entropy(piece, group.bits) for group, piece in pieces)
        return torch.as_tensor(self._weight * bits / sum(len(piece) for _, piece in pieces))


def entropy(latent_N: torch.Tensor, bits: int) -> torch.Tensor:
    """Bits per value, by the mean soft assignment of the values of a tensor to the levels."""
    z_N = (latent_N - latent_N.mean()) / (latent_N.std() + 1e-5)
    levels_A = torch.from_numpy(levels(bits))
    share_A = torch.softmax(-SHARPNESS * (z_N[:, None] - levels_A).square(), 1).mean(0)
    return -(share_A * (share_A + 1e-9).log2()).sum()


@dataclass(frozen=True, kw_only=True)
class RateAwareInputs(Inputs):
    """Inputs whose models are trained with the penalty."""

    weight: float

    def adapted(self, recipe: Recipe, selected: SelectedIndex | None) -> AdaptedModel:
        """The model, with one more term of the loss."""
        model = super().adapted(recipe, selected)
        model.banks.append(RateTerm(model.values.groups(), self.weight))
        return model


def measure(run: Run, place: Place) -> Run:
    """One fit."""
    bits, width, weight = VARIANTS[run["variant"]]
    recipe = {
        "adapter": {"width": width, "bits": bits},
        "head": {"bits": bits},
        "training": {"epochs": run["epochs"]},
    }
    plain = opened_run(run, place, recipe, SIZE_PX)
    given: dict[str, Any] = {field.name: getattr(plain, field.name) for field in fields(plain)}
    inputs = RateAwareInputs(**given, weight=weight) if weight else plain
    with tempfile.TemporaryDirectory() as folder:
        result = fit(inputs, inputs.task.recipe, None, Path(folder) / "fit", device=place.device)
        coded = row_of(read_pack(Path(folder) / "fit" / PACK_FILE), result.size_bytes)
    saved = sum(coded["plain"].values()) - sum(coded["coded"].values())
    return {**run, **figures(result), "coded_bytes": round(result.size_bytes - saved)}


def page(runs: Sequence[Run]) -> str:
    """A table per task, and the mean over the tasks."""
    lines = [
        "# Rate-aware training",
        "",
        "A bottleneck beside every MLP, and the head, on the embedded backbone at 32 px; `weight`",
        "is that of a penalty on the bits per value. *Coded* are the bytes of the file if an ideal",
        "entropy coder had written the codes. Test accuracy in percent is that of reloaded packs,",
        "the mean over the seeds; differences are paired by task and seed, ± their standard error.",
        "",
        f"| variant | coded, to {BASE} | points to {BASE} | points to 1 bit, w=16 | pairs |",
        "|---|---:|---:|---:|---:|",
    ]
    for variant in VARIANTS:
        pairs = paired(runs, variant, BASE)
        if pairs:
            share = fmean(run["coded_bytes"] / other["coded_bytes"] for run, other in pairs)
            points = [
                mean_difference(points_of(paired(runs, variant, other))) if other != variant else ""
                for other in (BASE, "1 bit, w=16")
            ]
            lines.append(f"| {variant} | {share:.2f} | {' | '.join(points)} | {len(pairs)} |")
    return "\n".join([*lines, *by_task(runs, TASKS, _rows)]) + "\n"


def _rows(runs: Sequence[Run]) -> list[str]:
    lines = ["| variant | bytes | coded | test % | seeds |", "|---|---:|---:|---:|---:|"]
    for variant in VARIANTS:
        own = [run for run in runs if run["variant"] == variant]
        if own:
            plain, coded = (fmean(run[key] for run in own) for key in ("bytes", "coded_bytes"))
            accuracy = fmean(map(percent, own))
            lines.append(
                f"| {variant} | {plain:,.0f} | {coded:,.0f} | {accuracy:.1f} | {len(own)} |"
            )
    return lines


def main() -> None:
    """Measure what is missing, write the page."""
    counts = {"limit": LIMIT}
    arguments = parse_arguments(__doc__, TASKS, "variant", VARIANTS, (0, 1), counts)
    runs = measure_missing(RESULTS, arguments, "variant", lambda runs, place: None, measure)
    RESULTS.with_suffix(".md").write_text(page(runs))


if __name__ == "__main__":
    main()
