"""Prepare: convert user data to shards with an index, and check it against the task.

Existing shards of images are scanned and indexed in place; all else is written as shards, into a
sibling folder that is renamed when it is complete, so that a folder with an index is complete. An
intact folder that was prepared from the same source is reused.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np

from pipeline.data.cloud_shards import cloud_shards_source
from pipeline.data.coco import coco_source
from pipeline.data.drawn import drawn_source
from pipeline.data.drawn_shapes import shapes_source
from pipeline.data.drawn_solids import solids_source
from pipeline.data.hdf5 import hdf5_source
from pipeline.data.held_out import hold_out_test
from pipeline.data.images import Images
from pipeline.data.index import (
    INDEX_NAME,
    DataIndex,
    ShardEntry,
    SplitName,
    read_index,
    write_index,
)
from pipeline.data.inspection import Inspection
from pipeline.data.listed import json_source, lists_source
from pipeline.data.manifests import csv_source
from pipeline.data.masked import masks_source
from pipeline.data.masks import kept_classes
from pipeline.data.modalities import MODALITIES
from pipeline.data.modality import Modality
from pipeline.data.names import class_names
from pipeline.data.quoting import listing, shortened
from pipeline.data.remote import shard_store
from pipeline.data.shards import MaskedSample, Sample, samples_in, write_shards
from pipeline.data.sources import Source, SourceSample, digits_source, folder_source
from pipeline.data.splits import splits_of
from pipeline.data.urls import expand, fetch, is_url, sha256_hex, stamp
from pipeline.data.verified import VERIFIED_NAME, are_intact
from pipeline.errors import DataError, StorageError
from pipeline.kinds import Label, TaskKind, classes_in, kind_named
from pipeline.specs import (
    CocoData,
    CsvData,
    DigitsData,
    DrawnData,
    FolderData,
    Hdf5Data,
    JsonData,
    ListsData,
    MasksData,
    ShardsData,
    Task,
)

_VERSION = 1  # part of every source digest: raise it when the same source would give other shards
_POINTS_VERSION = 1  # the same for how point clouds are stored
_MAX_INFERRED_CLASSES = 65536


def prepare(task: Task, folder: Path) -> DataIndex:
    """Prepare the dataset of `task` in `folder`, unless it is there already, and check that it
    suits the task.

    Raises:
        DataError: The data is missing, damaged or unsuitable.
        StorageError: The folder cannot be written, or holds something else.
    """
    folder = Path(os.path.abspath(folder))
    data, kind, modality = task.data, kind_named(task.kind), MODALITIES[task.modality]
    if (
        isinstance(data, ListsData | JsonData)
        and not is_url(data.root)
        and not Path(data.root).is_dir()
    ):
        origin = f"; it comes from {task.about.source}" if task.about.source else ""
        raise DataError(
            f"{data.root}: no such folder; expected the dataset of {task.name}, with its list of"
            f" {modality.noun}s for each split{origin}"
        )
    try:
        index = (
            _index_in_place(data, kind, folder)
            if isinstance(data, ShardsData) and modality is Images
            else _write(
                _source(data, kind, modality), _described(data, kind, modality), modality, folder
            )
        )
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = (
            "free some space, or choose another folder"
            if full
            else "check the path and the permissions"
        )
        raise StorageError(
            f"{error.filename or folder}: cannot be used ({error.strerror or error}); {advice}"
        ) from None
    check(index, task)
    return index


_WrittenData = (
    ShardsData
    | FolderData
    | CsvData
    | ListsData
    | JsonData
    | MasksData
    | CocoData
    | Hdf5Data
    | DigitsData
    | DrawnData
)


def _described(data: _WrittenData, kind: TaskKind, modality: type[Modality]) -> str:
    form = "" if modality is Images else f"{modality.name} {_POINTS_VERSION} "
    return f"{form}{kind.name} {data.model_dump_json()}"


def _source(data: _WrittenData, kind: TaskKind, modality: type[Modality]) -> Source:
    match data:
        case ShardsData():
            return cloud_shards_source(data, kind)
        case DigitsData():
            return digits_source(data).labelled_as(kind)
        case DrawnData():
            draw = {"shapes": shapes_source, "solids": solids_source}.get(data.kind, drawn_source)
            return draw(data).labelled_as(kind)
        case Hdf5Data():
            return hdf5_source(data).labelled_as(kind)
        case FolderData():
            source = folder_source(data, modality).labelled_as(kind)
        case CsvData():
            source = csv_source(data, kind, modality)
        case ListsData():
            source = lists_source(data, kind, modality)
        case JsonData():
            source = json_source(data, kind, modality)
        case MasksData():
            source = masks_source(data)
        case CocoData():
            source = coco_source(data)
    return source if data.test_fraction is None else hold_out_test(source, data.test_fraction)


def _current(folder: Path, source_digest: str) -> DataIndex | None:
    """The index in `folder` if it was made from this source and its local shards are the ones it
    lists.
    """
    if not (folder / INDEX_NAME).exists():
        return None
    index = read_index(folder)
    if index.source_digest != source_digest:
        return None
    return index if are_intact(folder, index) else None


# --- shards where they lie ------------------------------------------------------------------------


def _index_in_place(data: ShardsData, kind: TaskKind, folder: Path) -> DataIndex:
    splits: dict[SplitName, list[str]] = {"train": expand(data.train)}
    if data.val is not None:
        splits["val"] = expand(data.val)
    splits["test"] = expand(data.test)
    names = class_names(data.classes) if data.classes is not None else None
    stamps = [f"{split} {url} {stamp(url)}" for split, urls in splits.items() for url in urls]
    source_digest = sha256_hex(
        "\n".join(
            [f"shards {_VERSION} {kind.name} {names!r} {data.label_field!r}", *stamps]
        ).encode()
    )
    if (index := _current(folder, source_digest)) is not None:
        return index
    inspection = Inspection()
    entries = {
        split: [_scan(url, names, split, inspection, data.label_field, kind) for url in urls]
        for split, urls in splits.items()
    }
    inspection.check()
    _check_shards_differ(entries)
    classes = names if names is not None else _inferred_classes(entries)
    remarks = (*inspection.remarks(classes), *_order_remarks(entries["train"]))
    index = DataIndex(classes=classes, splits=entries, source_digest=source_digest, remarks=remarks)
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder, index)
    return index


def _inferred_classes(entries: dict[SplitName, list[ShardEntry]]) -> list[str]:
    largest, path = max(
        (shard.largest_class, shard.path) for shards in entries.values() for shard in shards
    )
    if largest >= _MAX_INFERRED_CLASSES:
        raise DataError(
            f"{path}: label {largest} is too large to count classes by; number the classes from 0"
        )
    return [str(label) for label in range(largest + 1)]


def _order_remarks(shards: list[ShardEntry]) -> list[str]:
    """A warning if shards hold far fewer classes than if their samples were mixed, else None."""
    held_by_shard = [
        [number for label in shard.labels for number in classes_in(label)] for shard in shards
    ]
    shares = np.bincount(np.concatenate(held_by_shard).astype(np.int64)) / sum(
        shard.samples for shard in shards
    )
    mixed = np.mean([np.sum(1 - (1 - shares) ** shard.samples) for shard in shards])
    held = np.mean([len(set(numbers)) for numbers in held_by_shard])
    if held - 1 >= (mixed - 1) / 2:
        return []
    return [
        f"the training samples are sorted by class: a shard holds {held:.1f} classes on average,"
        f" {mixed:.1f} if they were mixed; write the shards in random order, because contrastive"
        " batches are drawn from one shard at a time"
    ]


def _scan(
    url: str,
    names: list[str] | None,
    split: SplitName,
    inspection: Inspection,
    label_field: str | None,
    kind: TaskKind,
) -> ShardEntry:
    """Read every sample of a shard once, so that faults do not show only during training."""
    content = fetch(url)
    labels: list[Label] = []
    for key, image, label in samples_in(content, url, names, label_field, kind):
        inspection.look(split, f"{url}: {shortened(key)}", label, partial(bytes, image))
        labels.append(label)
    sha256 = sha256_hex(content)
    if is_url(url):
        shard_store().keep(content, sha256)  # training need not fetch it again
    return ShardEntry(
        path=url, samples=len(labels), size_bytes=len(content), sha256=sha256, labels=labels
    )


def _check_shards_differ(entries: dict[SplitName, list[ShardEntry]]) -> None:
    first_use: dict[str, str] = {}
    for split, shards in entries.items():
        for shard in shards:
            use = f"{split} {shard.path}"
            if shard.sha256 in first_use:
                raise DataError(
                    f"{use}: has the same content as {first_use[shard.sha256]}; the splits must not"
                    " share samples"
                )
            first_use[shard.sha256] = use


# --- everything else: written as shards -----------------------------------------------------------


def _write(source: Source, description: str, modality: type[Modality], folder: Path) -> DataIndex:
    source_digest = source.digest(f"{_VERSION} {description}")
    if (index := _current(folder, source_digest)) is not None:
        return index
    _check_replaceable(folder)
    building = _sibling(folder)
    building.mkdir(parents=True)
    try:
        inspection = Inspection(modality)
        splits = {
            split: write_shards(building, split, _shuffled(split, samples, inspection))
            for split, samples in source.splits.items()
        }
        inspection.check()
        remarks = tuple(inspection.remarks(source.classes))
        index = DataIndex(
            classes=source.classes, splits=splits, source_digest=source_digest, remarks=remarks
        )
        write_index(building, index)
        _publish(building, folder, lambda: _current(folder, source_digest) is not None)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return index


def _sibling(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")


def _shuffled(
    split: SplitName, samples: list[SourceSample], inspection: Inspection
) -> Iterator[Sample | MaskedSample]:
    """Shuffle the samples deterministically, so that a shard does not hold a single class.

    After a fault, the rest is only inspected.
    """
    for number, row in enumerate(np.random.default_rng(0).permutation(len(samples))):
        sample = samples[row]
        image = inspection.look(split, sample.name, sample.label, sample.load)
        if image is None:
            continue
        with inspection.faults.gathered():
            key = f"{number:06d}"
            written = (
                (key, image, sample.label)
                if sample.mask is None
                else _masked(key, image, sample.mask(image))
            )
            if not inspection.faults.messages:
                yield written


def _masked(key: str, image: bytes, mask: bytes) -> MaskedSample:
    return key, image, tuple(kept_classes(mask, key)), mask


def _check_replaceable(folder: Path) -> None:
    """Raise StorageError if `folder` holds anything that an earlier preparation did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StorageError(f"{folder}: is a file; choose another folder for the prepared dataset")
    index = read_index(folder) if (folder / INDEX_NAME).exists() else None
    own = {INDEX_NAME, VERIFIED_NAME} | (
        {shard.path for shard in index.shards} if index is not None else set()
    )
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if foreign:
        raise StorageError(
            f"{folder}: holds {foreign[0]}, which is no part of a prepared dataset; choose another"
            " folder, or empty this one"
        )


def _publish(building: Path, folder: Path, is_current: Callable[[], bool]) -> None:
    """Rename `building` to `folder`, replacing a dataset there unless another process has just
    written the same one.
    """
    try:
        os.rename(building, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if is_current():
            return
        former = _sibling(folder)
        os.rename(folder, former)
        os.rename(building, folder)
        shutil.rmtree(former)


# --- does it suit the task ------------------------------------------------------------------------


def check(index: DataIndex, task: Task) -> None:
    """Raise DataError unless the dataset has the classes, and enough samples in each split, for a
    study of `task`.
    """
    if len(set(index.classes)) < max(2, len(index.classes)):
        raise DataError(
            f"{task.name}: classes are {listing(index.classes)}; expected at least two, with"
            " different names"
        )
    if not index.splits.get("train") or not index.splits.get("test"):
        raise DataError(f"{task.name}: train or test is empty; each needs samples")
    trained = _classes_of(index.splits["train"])
    if len(trained) < 2:
        raise DataError(
            f"{task.name}: all training samples are of one class; expected at least two classes"
        )
    for split, shards in index.splits.items():
        missing = sorted(_classes_of(shards) - trained)
        if missing and not isinstance(
            task.data, ListsData | JsonData
        ):  # there, a benchmark's own lists say who is in train
            names = listing([index.classes[label] for label in missing])
            raise DataError(
                f"{task.name}: {split} has classes without a training sample: {names}; every class"
                " needs training samples"
            )
    train_samples = len(splits_of(task, index)[0]["train"])
    for key, batch_size in (
        ("recipe.training.batch_size", task.recipe.training.batch_size),
        ("selection.batch_size", task.selection.batch_size),
    ):
        if train_samples < batch_size:
            raise DataError(
                f"{task.name}: {train_samples} training samples are fewer than {key} ="
                f" {batch_size}; lower it, or add samples"
            )


def remarks_on(index: DataIndex) -> list[str]:
    """Warnings about a usable dataset: images that occur twice, ..."""
    untrained = untrained_classes(index)
    missing = (
        [f"no training sample of {len(untrained)} of the classes: {listing(untrained)}"]
        if untrained
        else []
    )
    return [*missing, *index.remarks]


def _classes_of(shards: Sequence[ShardEntry]) -> set[int]:
    return {number for shard in shards for label in shard.labels for number in classes_in(label)}


def untrained_classes(index: DataIndex) -> list[str]:
    """The classes without a training sample, which a model cannot learn but its accuracy counts
    like any other.
    """
    trained = _classes_of(index.splits["train"])
    return [name for number, name in enumerate(index.classes) if number not in trained]
