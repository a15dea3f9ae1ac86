"""Samples as tensors: decoded shards, cached in memory as long as they fit.

Random access to single members of a tar would decode each image once per epoch. Instead, a whole
shard is decoded once and cached; the least recently used is evicted first. The cache belongs to the
process: successive trials in a process, and tasks that share shards, find them decoded. Its key is
the content's SHA-256, never the file's name. Shards behind URLs are fetched a few ahead of their
use, and cached on disk (remote.py).
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import torch

from pipeline.data.decode import decode_image
from pipeline.data.index import ShardEntry
from pipeline.data.quoting import shortened
from pipeline.data.remote import fetch_checked, shard_store
from pipeline.data.shards import images_in
from pipeline.data.splits import Split
from pipeline.data.urls import is_url, resolve
from pipeline.kinds import Label

CACHE_BYTES = 1024**3
SHARDS_AHEAD = 4
Key = tuple[str, int]  # sha256, size_px
Targets = Callable[[list[Label]], torch.Tensor]
_one_class_each = functools.partial(torch.tensor, dtype=torch.int64)


class ShardCache:
    """Decoded shards, uint8 [N, 3, S, S], least recently used first. Thread-safe."""

    def __init__(self) -> None:
        self._images: OrderedDict[Key, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key, load: Callable[[], torch.Tensor], limit_bytes: int) -> torch.Tensor:
        """The shard under `key`, from `load` if it is not cached. Afterwards at most `limit_bytes`
        are cached, or this one shard alone.
        """
        with self._lock:
            if key not in self._images:
                self._images[key] = load()
            self._images.move_to_end(key)
            while len(self._images) > 1 and self.size_bytes() > limit_bytes:
                self._images.popitem(last=False)
            return self._images[key]

    def holds(self, key: Key) -> bool:
        """Whether a shard is cached."""
        with self._lock:
            return key in self._images

    def size_bytes(self) -> int:
        """Bytes in the cache."""
        return sum(images.nbytes for images in self._images.values())

    def clear(self) -> None:
        """Empty the cache."""
        with self._lock:
            self._images.clear()


CACHE = ShardCache()


class Reader:
    """Reads batches of the shards of one split.

    Args:
        targets: what is made of a batch's labels; default: one class per sample, int64 [B].
    """

    def __init__(
        self,
        index_folder: Path,
        shards: Split | Sequence[ShardEntry],
        size_px: int,
        cache_bytes: int = CACHE_BYTES,
        targets: Targets = _one_class_each,
    ) -> None:
        self.index_folder = index_folder
        self.shards = tuple(shards.shards if isinstance(shards, Split) else shards)
        self.size_px = size_px
        self.cache_bytes = cache_bytes
        self._targets = targets

    def window(self, numbers: Iterable[int] | None = None) -> int | None:
        """How many of the shards with these numbers (default: all) to mix at a time, so that they
        stay in the cache; None if all fit.
        """
        shards = self.shards if numbers is None else [self.shards[number] for number in numbers]
        sizes_bytes = [3 * self.size_px**2 * shard.samples for shard in shards]
        return (
            None
            if sum(sizes_bytes) <= self.cache_bytes
            else max(1, self.cache_bytes // max(sizes_bytes))
        )

    def read(
        self, samples: np.ndarray, content: Callable[[ShardEntry], bytes] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 [B, 3, S, S] and targets [B, ...] of `samples`, int [B, 2] rows of (shard,
        position), in their order.

        content: source of a shard's bytes; default: its path or URL.

        Raises DataError if a shard is missing, or is not the one that was indexed.
        """
        images = np.empty(
            (len(samples), 3, self.size_px, self.size_px), np.uint8
        )  # numpy copies rows of bytes many times faster than torch
        for number in np.unique(samples[:, 0]):
            rows = np.flatnonzero(samples[:, 0] == number)
            positions = samples[rows, 1]
            images[rows] = self._shard(self.shards[number], content or self._content).numpy()[
                positions
            ]
        labels = [self.shards[number].labels[position] for number, position in samples.tolist()]
        return torch.from_numpy(images), self._targets(labels)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Call `read` for each batch of a plan. The next shards behind URLs are fetched meanwhile.

        Raises DataError like `read`, when it reaches the shard.
        """
        if not plan or all(
            not is_url(shard.path) or CACHE.holds(self._key(shard)) for shard in self.shards
        ):
            yield from map(self.read, plan)
            return
        numbers, first_use = np.unique(np.concatenate(plan)[:, 0], return_index=True)
        coming = [self.shards[number] for number in numbers[np.argsort(first_use)]]
        remote = [
            shard for shard in coming if is_url(shard.path) and not CACHE.holds(self._key(shard))
        ]
        with _Ahead(remote, self._content) as ahead:
            for samples in plan:
                yield self.read(samples, ahead)

    def _shard(self, shard: ShardEntry, content: Callable[[ShardEntry], bytes]) -> torch.Tensor:
        return CACHE.get(
            self._key(shard), lambda: self._decode(shard, content(shard)), self.cache_bytes
        )

    def _key(self, shard: ShardEntry) -> Key:
        return shard.sha256, self.size_px

    def _content(self, shard: ShardEntry) -> bytes:
        url = resolve(self.index_folder, shard.path)
        return (
            shard_store().read(url, shard.sha256)
            if is_url(url)
            else fetch_checked(url, shard.sha256)
        )

    def _decode(self, shard: ShardEntry, content: bytes) -> torch.Tensor:
        url = resolve(self.index_folder, shard.path)
        images = np.empty((shard.samples, 3, self.size_px, self.size_px), np.uint8)
        for position, (key, image) in enumerate(images_in(content, url)):
            images[position] = decode_image(image, self.size_px, f"{url}: {shortened(key)}")
        return torch.from_numpy(images)


class _Ahead:
    """Fetches shards in threads, SHARDS_AHEAD at a time in the order of their first use; call it
    with a shard for its bytes.
    """

    def __init__(self, shards: Sequence[ShardEntry], fetch: Callable[[ShardEntry], bytes]) -> None:
        self._waiting, self._fetch = deque(shards), fetch
        self._coming: dict[str, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(SHARDS_AHEAD, thread_name_prefix="shards")

    def __enter__(self) -> Self:
        self._send_for_more()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, shard: ShardEntry) -> bytes:
        coming = self._coming.pop(shard.sha256, None)
        content = self._fetch(shard) if coming is None else coming.result()
        self._send_for_more()
        return content

    def _send_for_more(self) -> None:
        while self._waiting and len(self._coming) < SHARDS_AHEAD:
            shard = self._waiting.popleft()
            self._coming[shard.sha256] = self._pool.submit(self._fetch, shard)
