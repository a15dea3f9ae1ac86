"""The samples of a shard as they are stored, each of which can be read on its own."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.index import ShardEntry
from pipeline.data.remote import fetch_checked, shard_store
from pipeline.data.shards import sample_spans
from pipeline.data.unpack import unpacked
from pipeline.data.urls import is_url, resolve
from pipeline.data.verified import forget
from pipeline.errors import DataError


@dataclass(frozen=True)
class EncodedShard:
    """A shard whose content was checked.

    Where the shard is a plain file of this machine, single samples are read from it again, which
    keeps no more than their places in memory. Their checksums tell a file that has changed since.

    Attributes:
        spans: of each sample, where its image (and mask) begins and ends in the tar.
        checksums: of the same parts, where they are read from `path`.
        content: the tar, where `path` is not the same bytes.
    """

    url: str
    keys: list[str]
    spans: list[list[slice]]
    checksums: list[list[int]]
    path: Path | None
    content: bytes

    def sample(self, position: int) -> list[bytes]:
        """A sample's image, and its mask if samples have one. Raises DataError."""
        if self.path is None:
            return [self.content[span] for span in self.spans[position]]
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                parts = [_part(file, span) for span in self.spans[position]]
            finally:
                os.close(file)
        except OSError as error:
            raise DataError(
                f"{self.url}: cannot be read ({error.strerror}); copy or prepare it again"
            ) from None
        if [zlib.crc32(part) for part in parts] != self.checksums[position]:
            raise DataError(
                f"{self.url}: has changed while it was in use; prepare the dataset again"
            )
        return parts


def _part(file: int, span: slice) -> bytes:
    return os.pread(file, span.stop - span.start, span.start)


def encoded_shard(content: bytes, url: str, path: Path | None, has_masks: bool) -> EncodedShard:
    """Find the samples in a shard.

    Args:
        path: a file of this machine with the same content, if there is one.

    Raises:
        DataError: the shard is damaged, or its samples lack an image or a mask.
    """
    tar = unpacked(content, url)
    keys, spans = [], []
    for key, parts in sample_spans(tar, url, has_masks):
        keys.append(key)
        spans.append(parts)
    is_on_disk = path is not None and tar is content
    if not is_on_disk:
        return EncodedShard(url, keys, spans, [], None, tar)
    checksums = [[zlib.crc32(tar[span]) for span in parts] for parts in spans]
    return EncodedShard(url, keys, spans, checksums, path, b"")


def shard_content(index_folder: Path, entry: ShardEntry) -> bytes:
    """The bytes of a shard of an index, from its path or URL. Raises DataError if it is missing, or
    is not the one that was indexed; the next preparation then reads all shards.
    """
    url = resolve(index_folder, entry.path)
    read = shard_store().read if is_url(url) else fetch_checked
    try:
        return read(url, entry.sha256)
    except DataError:
        forget(index_folder)
        raise


def open_shard(
    index_folder: Path, entry: ShardEntry, has_masks: bool, content: bytes
) -> EncodedShard:
    """The samples of a shard of an index, whose bytes are `content`. Raises DataError as
    `encoded_shard`.
    """
    url = resolve(index_folder, entry.path)
    path = None if is_url(url) else Path(url)
    return encoded_shard(content, url, path, has_masks)
