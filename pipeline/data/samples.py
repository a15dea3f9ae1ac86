"""A few test images as files, to look at and to predict."""

from __future__ import annotations

import itertools
from pathlib import Path

from PIL import Image

from pipeline.data.decode import decode_image
from pipeline.data.index import read_index
from pipeline.data.shards import read_shard
from pipeline.data.urls import resolve

SAMPLE_PX = 64


def save_samples(data_folder: Path, folder: Path, count: int) -> list[Path]:
    """Write the first `count` test images as `<class>-<number>.png` into `folder`; their paths."""
    index = read_index(data_folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    samples = (sample for shard in index.splits["test"] for sample in read_shard(resolve(data_folder, shard.path)))
    for number, (_, image, label) in enumerate(itertools.islice(samples, count)):
        paths.append(folder / f"{index.classes[label]}-{number}.png")
        Image.fromarray(decode_image(image, SAMPLE_PX).transpose(1, 2, 0)).save(paths[-1])
    return paths
