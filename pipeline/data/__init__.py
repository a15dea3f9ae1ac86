"""From user data to shards, and from shards to batches.

Imports: errors, kinds, specs, utils.
"""

from pipeline.data.augment import (
    augment,
    numbered_generator,
    two_views,
)
from pipeline.data.batch_plan import (
    deal_shards,
    evaluation_batches,
    shard_batches,
    training_batches,
)
from pipeline.data.decode import decode_image, open_image, rgb_image
from pipeline.data.images import Images
from pipeline.data.index import DataIndex, ShardEntry, read_index, write_index
from pipeline.data.modalities import MODALITIES
from pipeline.data.modality import Modality
from pipeline.data.prepare import check, prepare, remarks_on, untrained_classes
from pipeline.data.reader import Reader
from pipeline.data.samples import save_samples
from pipeline.data.shards import read_shard, write_shards
from pipeline.data.splits import Split, split_samples, splits_of

__all__ = [
    "MODALITIES",
    "DataIndex",
    "Images",
    "Modality",
    "Reader",
    "ShardEntry",
    "Split",
    "augment",
    "check",
    "deal_shards",
    "decode_image",
    "evaluation_batches",
    "numbered_generator",
    "open_image",
    "prepare",
    "read_index",
    "read_shard",
    "remarks_on",
    "rgb_image",
    "save_samples",
    "shard_batches",
    "split_samples",
    "splits_of",
    "training_batches",
    "two_views",
    "untrained_classes",
    "write_index",
    "write_shards",
]
