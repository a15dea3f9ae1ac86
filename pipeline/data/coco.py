"""JSON files in COCO's layout: images whose regions, polygons or run lengths, have categories.

    {"images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}, ...],
     "categories": [{"id": 18, "name": "dog"}, ...],
     "annotations": [{"id": 7, "image_id": 1, "category_id": 18, "iscrowd": 0,
                      "segmentation": [[x1, y1, x2, y2, ...], ...]
                                      or {"size": [H, W], "counts": [...] or "..."}}, ...]}

A mask is drawn from the largest annotation to the smallest, so that what lies on something else is
seen; of equal ones the later wins. Crowds are drawn first, as pixels that are not counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.data.decode import open_image
from pipeline.data.entries import Entry, listed_samples, located
from pipeline.data.index import SplitName
from pipeline.data.names import check_names, class_names
from pipeline.data.quoting import listing, quoted, shortened
from pipeline.data.regions import polygons_mask, runs_mask
from pipeline.data.sources import Source, SourceSample, encode_png
from pipeline.data.text import read_text
from pipeline.data.urls import sha256_hex
from pipeline.errors import DataError
from pipeline.kinds import IGNORED
from pipeline.specs import CocoData

_EXPECTED = "an object with images, annotations and categories, as COCO has them"
_BACKGROUND = "background"
Content = Mapping[str, Any]


@dataclass(frozen=True)
class _Region:
    """An annotation: `number` is its class, or IGNORED for a crowd."""

    where: str
    number: int
    segmentation: Any

    def pixels(self, height: int, width: int) -> np.ndarray:
        """Where it lies in the rows of a mask one after the other. Raises DataError."""
        found = self.segmentation
        try:
            if isinstance(found, dict):
                return np.flatnonzero(runs_mask(found, height, width))
            if not isinstance(found, list) or not found:
                raise ValueError("no segmentation; a box alone has no mask")
            return np.flatnonzero(polygons_mask(found, height, width))
        except ValueError as error:
            raise DataError(
                f"{self.where}: {error}; expected polygons or run lengths, as COCO has them"
            ) from None


def coco_source(data: CocoData) -> Source:
    """The images of each file with their masks. Raises DataError, which names the file and the
    annotation.
    """
    paths: dict[SplitName, str | None] = {"train": data.train, "val": data.val, "test": data.test}
    files = {split: path for split, path in paths.items() if path is not None}
    contents = {split: _content(path) for split, path in files.items()}
    categories = {split: _categories(contents[split], files[split]) for split in files}
    names = _names(data, categories, files)
    entries = {
        split: _entries(contents[split], files[split], _root(data, split)) for split in files
    }
    samples = listed_samples(entries)
    masked: dict[SplitName, list[SourceSample]] = {}
    for split, path in files.items():
        numbers = {
            key: names.index(name) if name in names else 0
            for key, name in categories[split].items()
        }
        regions = _regions(contents[split], path, numbers)
        masked[split] = [
            _masked(sample, image, regions[image["id"]])
            for sample, image in zip(samples[split], contents[split]["images"], strict=True)
        ]
    return Source(names, masked)


def _root(data: CocoData, split: SplitName) -> str:
    """The folder of a split's images."""
    if isinstance(data.images, str):
        return data.images
    if data.images is None:
        return os.path.dirname(getattr(data, split))  # also of a URL
    if split not in data.images:
        raise DataError(f"images: no folder for {split}; expected one for each split")
    return data.images[split]


def _content(path: str) -> Content:
    """The object in a file, whose three lists hold objects. Raises DataError."""
    try:
        content = json.loads(read_text(path, _EXPECTED))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON ({shortened(str(error), 100)}); expected {_EXPECTED}"
        ) from None
    for key in ("images", "annotations", "categories"):
        found = content.get(key) if isinstance(content, dict) else None
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise DataError(f"{path}: has no list {key!r} of objects; expected {_EXPECTED}")
    if not content["images"]:
        raise DataError(f"{path}: lists no images; expected some")
    return dict(content)


def _categories(content: Content, path: str) -> dict[int, str]:
    """The names of categories by their ids, in ascending order."""
    found: dict[int, str] = {}
    for number, each in enumerate(content["categories"], start=1):
        key, name = each.get("id"), each.get("name")
        if type(key) is not int or not isinstance(name, str):
            raise DataError(f"{path}: category {number}: expected a whole number `id` and a `name`")
        if key in found or name in found.values():
            raise DataError(
                f"{path}: category {number}: id {key} or name {quoted(name)} is given before;"
                " expected different ones"
            )
        found[key] = name
    check_names(found.values(), path)
    return dict(sorted(found.items()))


def _names(
    data: CocoData,
    categories: Mapping[SplitName, Mapping[int, str]],
    files: Mapping[SplitName, str],
) -> list[str]:
    """The classes, checked against the categories. Raises DataError."""
    known = list(categories["train"].values())
    if data.classes is None:
        names = list(dict.fromkeys([_BACKGROUND, *known]))
        for split, each in categories.items():
            if foreign := sorted({*each.values()} - {*names}):
                raise DataError(
                    f"{files[split]}: the categories {listing(foreign)} are not in train; add them"
                    " there, or name the classes in `classes`"
                )
    else:
        names = class_names(data.classes)
        if foreign := sorted({*names[1:]} - {*known}):
            raise DataError(
                f"classes: {listing(foreign)} no categories of {files['train']}; expected the name"
                f" of the first class, then some of {listing(known)}"
            )
    if len(names) > IGNORED:
        raise DataError(
            f"classes: {len(names)} of them; masks have one byte per pixel: expected at most"
            f" {IGNORED}, named in `classes`"
        )
    return names


def _entries(content: Content, path: str, root: str) -> list[Entry]:
    """The images of a file, each with a different id. Raises DataError."""
    entries, ids = [], set()
    for number, image in enumerate(content["images"], start=1):
        key, name = image.get("id"), image.get("file_name")
        if not isinstance(key, int | str) or not isinstance(name, str) or not name:
            raise DataError(f"{path}: image {number}: expected an `id` and a `file_name`")
        if key in ids:
            raise DataError(f"{path}: image {number}: the id {quoted(key)} is given before")
        ids.add(key)
        entries.append(Entry(f"{path}: image {quoted(key)}", located(name, root), ()))
    return entries


def _regions(
    content: Content, path: str, numbers: Mapping[int, int]
) -> dict[int | str, list[_Region]]:
    """The regions of each image. Raises DataError."""
    found: dict[int | str, list[_Region]] = {image["id"]: [] for image in content["images"]}
    for number, each in enumerate(content["annotations"], start=1):
        where = f"{path}: annotation {quoted(each.get('id', f'number {number}'))}"
        image, category, crowd = (
            each.get("image_id"),
            each.get("category_id"),
            each.get("iscrowd", 0),
        )
        if not isinstance(image, int | str) or image not in found:
            raise DataError(f"{where}: image_id {quoted(image)} is that of no image")
        if type(category) is not int or category not in numbers:
            raise DataError(f"{where}: category_id {quoted(category)} is that of no category")
        if crowd not in (0, 1):
            raise DataError(f"{where}: iscrowd is {quoted(crowd)}; expected 0 or 1")
        own = IGNORED if crowd else numbers[category]
        found[image].append(_Region(where, own, each.get("segmentation")))
    return found


def _masked(sample: SourceSample, image: Content, regions: Sequence[_Region]) -> SourceSample:
    """The sample with its mask."""
    written = [[each.number, each.segmentation] for each in regions]
    digest = sha256_hex(json.dumps(written).encode())
    sizes = (image.get("width"), image.get("height"))
    draw = partial(_mask_png, regions=regions, declared=sizes, name=sample.name)
    return SourceSample(sample.name, f"{sample.stamp} {digest}", sample.label, sample.load, draw)


def _mask_png(
    image: bytes, regions: Sequence[_Region], declared: tuple[Any, Any], name: str
) -> bytes:
    """The mask of an image as it is kept. Raises DataError."""
    width, height = open_image(image, name).size
    if declared not in ((None, None), (width, height)):
        raise DataError(
            f"{name}: {width} x {height} px, but {declared[0]} x {declared[1]} in the annotations;"
            " expected the images that were annotated"
        )
    drawn = [(each.number, each.pixels(height, width)) for each in regions]
    drawn.sort(key=lambda each: (each[0] != IGNORED, -len(each[1])))
    mask = np.zeros(height * width, np.uint8)
    for number, pixels in drawn:
        mask[pixels] = number
    if (mask == IGNORED).all():
        raise DataError(f"{name}: every pixel is of a crowd; remove it")
    return encode_png(mask.reshape(height, width))
