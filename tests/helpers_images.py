"""Image folders and their data sections in every format, for the tests of reported conditions."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data import write_shards
from pipeline.data.sources import encode_png
from pipeline.specs import Task


def pixels_of(number: int, size: tuple[int, int] = (6, 5)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


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


def write_folders(
    root: Path, classes: tuple[str, ...] = ("cat", "dog"), train: int = 8, test: int = 3
) -> dict[str, Any]:
    """Image folders of distinct PNGs, and their data section."""
    number = 0
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for _ in range(count):
                (root / split / name / f"{number}.png").write_bytes(encode_png(pixels_of(number)))
                number += 1
    return {"format": "folder", "train": str(root / "train"), "test": str(root / "test")}


def listed(root: Path, kind: str) -> dict[str, Any]:
    """The images of `write_folders` in the other formats' words."""
    images = {split: sorted((root / split).rglob("*.png")) for split in ("train", "test")}
    labels = {
        split: [int(path.parent.name == "dog") for path in paths] for split, paths in images.items()
    }
    for split, paths in images.items():
        if kind == "csv":
            with (root / f"{split}.csv").open("w") as stream:
                csv.writer(stream).writerows(
                    [("path", "label"), *((path, path.parent.name) for path in paths)]
                )
        elif kind == "lists":
            (root / f"{split}.txt").write_text(
                "".join(
                    f"{path} {label}\n" for path, label in zip(paths, labels[split], strict=True)
                )
            )
        else:
            (root / f"{split}.json").write_text(
                json.dumps(
                    {str(path): label for path, label in zip(paths, labels[split], strict=True)}
                )
            )
    if kind == "csv":
        return {"format": "csv", "train": str(root / "train.csv"), "test": str(root / "test.csv")}
    ending = "txt" if kind == "lists" else "json"
    return {
        "format": kind,
        "root": str(root),
        "train": f"train.{ending}",
        "val": None,
        "test": f"test.{ending}",
        "classes": 2,
    }


def shards_of(root: Path, shuffled: bool = True) -> dict[str, Any]:
    for split in ("train", "test"):
        paths = sorted((root / split).rglob("*.png"))
        order = np.random.default_rng(0).permutation(len(paths)) if shuffled else range(len(paths))
        samples = [
            (
                f"{number:06d}",
                paths[number].read_bytes() or b"\x89PNG\r\n\x1a\n",
                int(paths[number].parent.name == "dog"),
            )
            for number in order
        ]
        write_shards(root, split, samples, samples_per_shard=4)
    return {
        "format": "shards",
        "train": str(root / "train-*.tar"),
        "test": str(root / "test-*.tar"),
    }


FORMATS = ["folder", "csv", "lists", "json", "shards"]


def as_format(kind: str, folders: dict[str, Any], root: Path) -> dict[str, Any]:
    return (
        folders if kind == "folder" else shards_of(root) if kind == "shards" else listed(root, kind)
    )
