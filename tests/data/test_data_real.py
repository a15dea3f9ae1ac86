"""Real datasets are read, where they are present."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_datasets import labels_of, task_of
from helpers_paths import PROJECT_ROOT

from pipeline.data import (
    Images,
    Reader,
    evaluation_batches,
    prepare,
    split_samples,
)

SHARED = PROJECT_ROOT / ".." / "shared" / "data"

# --- real data, where it is present ---------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_real_shards(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = (SHARED / name).resolve()
    paths = {
        key: f"{folder}/{file}"
        for key, file in {
            "train": "train.tar",
            "test": "test.tar",
            "classes": "classes.txt",
        }.items()
    }
    task = task_of({"format": "shards", **paths})
    index = prepare(task, tmp_path / "p")
    assert index.classes == (folder / "classes.txt").read_text().split()
    splits = split_samples(index, task.val_fraction, task.seed)
    assert [len(splits[split]) for split in ("train", "val", "trainval", "test")] == [
        800,
        200,
        1000,
        2000,
    ]
    assert np.bincount(splits["val"].labels).tolist() == [20] * 10
    reader = Reader(tmp_path / "p", splits["val"], Images(32))
    images = torch.cat([reader.read(batch)[0] for batch in evaluation_batches(splits["val"], 64)])
    assert images.shape == (200, 3, 32, 32)
    assert images.float().std() > 30


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
def test_real_manifest(tmp_path: Path) -> None:
    folder = (SHARED / "elpv").resolve()
    index = prepare(
        task_of(
            {"format": "csv", "train": str(folder / "train.csv"), "test": str(folder / "test.csv")}
        ),
        tmp_path / "p",
    )
    assert index.classes == ["defective", "functional", "likely_defective", "possibly_defective"]
    with (folder / "train.csv").open() as stream:
        expected = Counter(row["label"] for row in csv.DictReader(stream))
    assert Counter(index.classes[label] for label in labels_of(index, "train")) == expected
    assert (
        prepare(
            task_of(
                {
                    "format": "csv",
                    "train": str(folder / "train.csv"),
                    "test": str(folder / "test.csv"),
                }
            ),
            tmp_path / "p",
        )
        == index
    )
