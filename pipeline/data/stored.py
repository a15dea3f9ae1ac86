"""The samples of a split with masks as they are stored: images and masks in their own sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.data.encoded_shard import EncodedShard, open_shard, shard_content
from pipeline.data.masks import whole_mask
from pipeline.data.splits import Split


def stored_samples(index_folder: Path, split: Split) -> Iterator[tuple[bytes, np.ndarray]]:
    """Each sample's image, encoded, and its mask, uint8 [H, W], in the split's order.

    Raises DataError if a shard is missing, or is not the one that was indexed.
    """
    opened: tuple[int, EncodedShard] | None = None
    for number, position in split.samples.tolist():
        if opened is None or opened[0] != number:
            entry = split.shards[number]
            content = shard_content(index_folder, entry)
            opened = number, open_shard(index_folder, entry, has_masks=True, content=content)
        image, mask = opened[1].sample(position)
        yield image, whole_mask(mask, f"{opened[1].url}: {opened[1].keys[position]}")
