"""Shards of point clouds: WebDataset tars of `key.npy`, `key.ply` or another format of `clouds.py`,
and `key.cls` or `key.json`. Unlike shards of images, they are not indexed in place: clouds are
written again, in farthest-point order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from pipeline.data.index import SplitName
from pipeline.data.names import class_names
from pipeline.data.points import Points
from pipeline.data.quoting import shortened
from pipeline.data.shards import samples_in
from pipeline.data.sources import Source, SourceSample
from pipeline.data.urls import expand, fetch, stamp
from pipeline.errors import DataError
from pipeline.kinds import TaskKind, classes_in
from pipeline.specs import ShardsData

_MAX_INFERRED_CLASSES = 65536


def cloud_shards_source(data: ShardsData, kind: TaskKind) -> Source:
    """The clouds of shards, which are held in memory, as they are encoded, until they are written.
    Raises DataError that names the shard and the member at fault.
    """
    splits = {"train": data.train, "val": data.val, "test": data.test}
    names = class_names(data.classes) if data.classes is not None else None
    samples: dict[SplitName, list[SourceSample]] = {
        split: [  # type: ignore[misc]
            sample for url in expand(paths) for sample in _samples(url, names, data, kind)
        ]
        for split, paths in splits.items()
        if paths is not None
    }
    if names is None:
        every = [sample for each in samples.values() for sample in each]
        labels = [(max(classes_in(sample.label), default=0), sample.name) for sample in every]
        largest, name = max(labels)
        if largest >= _MAX_INFERRED_CLASSES:
            raise DataError(
                f"{name}: label {largest} is too large to count classes by; number the"
                " classes from 0"
            )
        names = [str(number) for number in range(largest + 1)]
    return Source(names, samples)


def _samples(
    url: str, names: list[str] | None, data: ShardsData, kind: TaskKind
) -> Iterator[SourceSample]:
    content, changed = fetch(url), stamp(url)
    for key, cloud, label in samples_in(content, url, names, data.label_field, kind, Points):
        yield SourceSample(f"{url}: {shortened(key)}", changed, label, partial(bytes, cloud))
