"""What the measurements of `packs.py` are made on: the places that real tasks select."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.adaptation import RankedIndices, SelectedIndex
from pipeline.adaptation.selected.ranking import kept_indices
from pipeline.adaptation.sites import weight_shapes
from pipeline.data import prepare
from pipeline.packs import LayerShape
from pipeline.selection import read_selection, select_locally, write_selection
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, open_inputs


@dataclass(frozen=True)
class Selected:
    """A task's places, layer by layer, for one K."""

    names: list[str]
    places: list[np.ndarray]
    shapes: list[LayerShape]

    @property
    def count(self) -> int:
        """Number of connections."""
        return sum(shape.count for shape in self.shapes)

    @property
    def fixed_bytes(self) -> float:
        """Columns at a fixed width."""
        return sum(shape.count * (shape.columns - 1).bit_length() for shape in self.shapes) / 8

    @property
    def entropy_bytes(self) -> float:
        """Empirical entropy of each layer's columns, the columns' distribution for free."""
        bits = 0.0
        for index_N, shape in zip(self.places, self.shapes, strict=True):
            counts = np.bincount(index_N % shape.columns)
            share = counts[counts > 0] / shape.count
            bits -= shape.count * float((share * np.log2(share)).sum())
        return bits / 8


def selected_of(ranked: SelectedIndex, inputs: Inputs, top_k: int) -> Selected:
    """The places that `top_k` keeps."""
    kept, shapes = kept_indices(ranked, top_k), weight_shapes(inputs.backbone.model)
    places = {name: index_N.numpy() for name, index_N in kept.items()}
    return Selected(
        list(places),
        list(places.values()),
        [LayerShape(*shapes[name], len(each)) for name, each in places.items()],
    )


def open_task(path: Path, workdir: Path) -> tuple[Inputs, dict[str, RankedIndices]]:
    """A task's inputs and its ranked selection of 3 connections a neuron, computed once."""
    task = load_task(path)
    folder = workdir / "data" / task.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    prepare(task, folder)
    inputs = open_inputs(task, folder)
    selection = workdir / f"{task.name}.safetensors"
    if not selection.exists():
        write_selection(select_locally(inputs, 3), selection)
    return inputs, read_selection(selection)
