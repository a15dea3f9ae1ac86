"""What a worker needs to work on a task: its backbone, its splits and readers of their shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.data import DataIndex, Reader, Split, read_index, split_samples
from pipeline.spec import Task

CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Inputs:
    """One task, opened. `splits` has train, val, trainval and test."""

    task: Task
    index: DataIndex
    backbone: LoadedBackbone
    splits: dict[str, Split]
    data_folder: Path

    def reader(self, split: str) -> Reader:
        """A reader of one split's samples."""
        return Reader(self.data_folder, self.splits[split], self.backbone.size_px, CACHE_BYTES)


def open_inputs(task: Task, data_folder: Path) -> Inputs:
    """Open a prepared task. Backbone and decoded images are kept by the process, so a second call is cheap."""
    index = read_index(data_folder)
    splits = split_samples(index, task.val_fraction, task.seed)
    backbone = load_backbone(task.backbone, task.input)
    return Inputs(task.model_copy(update={"backbone": backbone.spec}), index, backbone, splits, data_folder)
