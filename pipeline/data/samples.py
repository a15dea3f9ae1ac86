"""Write a few test images as files, to look at and to predict."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from pipeline.data.decode import decode_image
from pipeline.data.index import read_index
from pipeline.data.shards import images_in
from pipeline.data.urls import fetch, resolve
from pipeline.kinds import Label, classes_in

SAMPLE_PX = 64


def save_samples(data_folder: Path, folder: Path, count: int) -> list[Path]:
    """Write the first `count` test images as `<class>-<number>.png` into `folder`; return their
    paths.
    """
    index = read_index(data_folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    samples = (
        sample
        for shard in index.splits["test"]
        for sample in _labelled(resolve(data_folder, shard.path), shard.labels)
    )
    for number, (image, label) in enumerate(itertools.islice(samples, count)):
        class_name = (
            re.sub(
                r"[^\w.-]+", "_", "+".join(index.classes[number] for number in classes_in(label))
            )[:60]
            or "none"
        )
        paths.append(folder / f"{class_name}-{number}.png")
        Image.fromarray(decode_image(image, SAMPLE_PX).transpose(1, 2, 0)).save(paths[-1])
    return paths


def _labelled(url: str, labels: Sequence[Label]) -> Iterator[tuple[bytes, Label]]:
    return zip((image for _, image in images_in(fetch(url), url)), labels, strict=True)
