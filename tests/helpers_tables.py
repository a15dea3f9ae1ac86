"""Tasks on small images, from whatever describes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.manifests import csv_source
from pipeline.data.sources import Source, encode_png
from pipeline.errors import DataError
from pipeline.specs import CsvData, Task

MESSAGE_MAX = 300  # besides the path of the file, which is the user's own


TEST_TABLE = "path,label\n6.png,cat\n7.png,dog\n"


def image_of(number: int) -> bytes:
    return encode_png(np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8))


def message_of(read: Callable[[], Any], file: object = "") -> str:
    """The one short line that `read` is refused with; it names `file`."""
    with pytest.raises(DataError) as caught:
        read()
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    assert len(message.replace(str(file), "")) <= MESSAGE_MAX, message
    return message


def samples_of(source: Source, split: Any = "train") -> list[tuple[str, str]]:
    return [
        (Path(sample.name).name, source.classes[sample.label]) for sample in source.splits[split]
    ]


def task_of(data: dict[str, Any]) -> Task:
    small = {
        "recipe": {"preset": "default", "training": {"batch_size": 2}},
        "selection": {"batch_size": 2},
        "val_fraction": 0.5,
    }
    return Task.model_validate(
        {
            "name": "t",
            "data": data,
            "backbone": {"model": "vit_tiny_patch16_224", "weights": "random"},
            **small,
        }
    )


def read_csv(folder: Path, train: str | bytes, test: str = TEST_TABLE, **options: Any) -> Source:
    (folder / "train.csv").write_bytes(train if isinstance(train, bytes) else train.encode())
    (folder / "test.csv").write_text(test)
    return csv_source(
        CsvData(
            format="csv", train=str(folder / "train.csv"), test=str(folder / "test.csv"), **options
        )
    )
