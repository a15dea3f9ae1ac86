"""Figures of the best, the median and the worst of a test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.adaptation import AdaptedModel
from pipeline.data import DataIndex, Modality, Reader, Split
from pipeline.data.points import Points
from pipeline.kinds import Metric, Outcomes, TaskKind
from pipeline.reports.cloud_figure import draw_clouds
from pipeline.reports.overlay_figure import draw_overlays
from pipeline.training.full_size import predicted_masks


def draw_masks(
    figure: Path,
    model: AdaptedModel,
    metric: Metric,
    outcomes: Outcomes,
    folder: Path,
    test: Split,
    index: DataIndex,
    takes: Modality,
) -> None:
    """Draw the masks of the best, the median and the worst image by the metric of each alone."""
    values = [metric.value(outcomes.only(number)) for number in range(len(outcomes))]
    chosen = _three(values)
    picked = replace(test, samples=test.samples[list(chosen.values())])
    titles = [f"{name}: {metric.name} {values[number]:.3f}" for name, number in chosen.items()]
    masks = predicted_masks(model, folder, picked, takes)
    overlays = [(title, *each) for title, each in zip(titles, masks, strict=True)]
    draw_overlays(overlays, index.classes, figure)


def draw_predicted_clouds(
    figure: Path,
    outcomes: Outcomes,
    reader: Reader,
    test: Split,
    kind: TaskKind,
    classes: Sequence[str],
) -> None:
    """Draw the clouds of the best, the median and the worst prediction by its loss, each with what
    is predicted of it and what it is.
    """
    outputs = torch.from_numpy(outcomes.outputs).float()
    truths = kind.soft_targets(torch.from_numpy(outcomes.targets), len(classes))
    pairs = zip(outputs.split(1), truths.split(1), strict=True)
    chosen = _three([-float(kind.loss(*pair)) for pair in pairs])
    numbers = list(chosen.values())
    titles = [
        f"{name}: predicted {_said(row)}, true {_named(truths[number], classes)}"
        for (name, number), row in zip(
            chosen.items(), kind.predictions(outputs[numbers], classes), strict=True
        )
    ]
    clouds, _ = reader.read(test.samples[numbers])
    takes = reader.takes
    assert isinstance(takes, Points)
    draw_clouds(list(zip(titles, clouds.float().numpy(), strict=True)), figure, takes.up)


def _three(values: Sequence[float]) -> dict[str, int]:
    """The numbers of the best, the median and the worst sample."""
    order = sorted(range(len(values)), key=lambda number: (-values[number], number))
    return {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}


def _said(row: dict[str, object]) -> str:
    labels = row["labels"] if "labels" in row else [row["label"]]
    assert isinstance(labels, list)
    return " and ".join(labels) or "nothing"


def _named(truth_C: torch.Tensor, classes: Sequence[str]) -> str:
    names = [name for name, share in zip(classes, truth_C.tolist(), strict=True) if share]
    return " and ".join(names) or "nothing"
