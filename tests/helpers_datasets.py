"""Sources of data for the tests of their preparation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.data import DataIndex
from pipeline.specs import Task

DIGITS = {"format": "digits", "train_samples": 60, "test_samples": 40}


def task_of(data: dict[str, Any], **sections: Any) -> Task:
    content = {
        "name": "t",
        "data": data,
        "backbone": {"model": "vit_tiny_patch16_224", "weights": "random"},
        **sections,
    }
    return Task.model_validate(
        {
            "recipe": {"preset": "default", "training": {"batch_size": 4}},
            "selection": {"batch_size": 4},
            **content,
        }
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def labels_of(index: DataIndex, split: Any) -> list[int]:
    return [label for shard in index.splits[split] for label in shard.labels]
