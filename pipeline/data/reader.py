"""Samples as tensors: decoded ahead of their use, and kept in memory as long as they fit.

Images are decoded when a batch first needs them, by a pool of threads (Pillow releases the GIL),
several a job, while the model works on the batch before. The images of a shard share one piece of
memory, so successive trials in a process, tasks that share shards, and all processes of a machine
find them decoded (node_memory.py); the least recently used shard is evicted first. Its key is the
content's SHA-256, never the file's name. Shards behind URLs are fetched a few ahead of their use,
and cached on disk (remote.py).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from pipeline.data.decoded_shard import COLOURS, DecodedShard, Form, decode
from pipeline.data.encoded_shard import EncodedShard, open_shard, shard_content
from pipeline.data.index import ShardEntry
from pipeline.data.modality import Modality
from pipeline.data.node_memory import node_memory
from pipeline.data.splits import Split
from pipeline.data.urls import is_url, resolve
from pipeline.kinds import Annotations
from pipeline.utils.byte_cache import ByteCache

CACHE_BYTES = 2 << 30
"""What a process may always keep; shared memory adds to it."""
SHARDS_AHEAD = 4
BATCHES_AHEAD = 2
JOBS_PER_DECODER = 2
"""Into how many jobs for each thread a batch is divided at least: fewer leave threads without work
at its end.
"""
MOST_TOGETHER = 16
"""Samples of a job: so many small images fit into a processor's cache."""
DECODER = "1"
"""Changes when the same content decodes to other bytes: two releases may run beside each other."""
Key = tuple[str, str]  # sha256, the form's key
Targets = Callable[[Annotations], torch.Tensor]
Item = TypeVar("Item")
_one_class_each = functools.partial(torch.tensor, dtype=torch.int64)


class ShardCache:
    """Shards by content and form, least recently used first. Thread-safe."""

    def __init__(self) -> None:
        self._shards: ByteCache[Key, DecodedShard] = ByteCache()
        self._lock = threading.Lock()

    def get(self, sha256: str, form: Form, samples: int, limit_bytes: int) -> DecodedShard:
        """The shard with this content. Afterwards at most `limit_bytes`, or as much as the
        machine's processes share, is kept, or this one shard alone.
        """
        key, size_bytes = (sha256, form.key), form.size_bytes(samples)
        with self._lock:
            shard = self._shards.get(key)
            if shard is None:
                memory = node_memory().array(f"{sha256}-{form.key}-{DECODER}", size_bytes)
                if memory is None:
                    memory = np.zeros(size_bytes, np.uint8)
                shard = DecodedShard(memory, samples, form)
                self._shards.put(key, shard, size_bytes)
            self._shards.trim(max(limit_bytes, node_memory().limit_bytes), at_least=1)
            return shard

    def is_decoded(self, key: Key) -> bool:
        """Whether the whole shard is here and decoded."""
        shard = self._shards.get(key)
        return shard is not None and shard.is_decoded

    def size_bytes(self) -> int:
        """Bytes in the cache."""
        return self._shards.size_bytes

    def clear(self) -> None:
        """Empty the cache."""
        self._shards.clear()


CACHE = ShardCache()


@dataclass
class Waited:
    """How long this process's readers have let their callers wait for batches."""

    seconds: float = 0.0

    def for_result(self, coming: Future[Item]) -> Item:
        """What comes, and the time it took."""
        began = time.perf_counter()
        try:
            return coming.result()
        finally:
            self.seconds += time.perf_counter() - began


WAITED = Waited()


class Reader:
    """Reads batches of the shards of one split.

    Args:
        takes: what samples are decoded to.
        targets: what is made of a batch's labels, or of its masks; default: one class per sample,
            int64 [B].
        has_masks: whether samples have masks.
    """

    def __init__(
        self,
        index_folder: Path,
        shards: Split | Sequence[ShardEntry],
        takes: Modality,
        cache_bytes: int = CACHE_BYTES,
        targets: Targets = _one_class_each,
        has_masks: bool = False,
    ) -> None:
        self.index_folder, self.takes = index_folder, takes
        self._content = functools.partial(shard_content, index_folder)
        self.shards = tuple(shards.shards if isinstance(shards, Split) else shards)
        self._form = Form(takes, has_masks)
        self.cache_bytes = cache_bytes
        self._targets = targets
        self._decoders = torch.get_num_threads()  # of this thread: torch counts for each its own

    def window(self, numbers: Iterable[int] | None = None) -> int | None:
        """How many of the shards with these numbers (default: all) to shuffle together, so that
        they take at most half of `cache_bytes`; None if all of them do. The other half is for the
        next shards, or for those of another split.
        """
        shards = self.shards if numbers is None else [self.shards[number] for number in numbers]
        sizes_bytes = [self._form.size_bytes(shard.samples) for shard in shards]
        half = self.cache_bytes // 2
        return None if sum(sizes_bytes) <= half else max(1, half // max(sizes_bytes))

    def read(
        self, samples: np.ndarray, content: Callable[[ShardEntry], bytes] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoded samples [B, ...] and targets [B, ...] of `samples`, int [B, 2] rows of (shard,
        position), in their order.

        content: source of a shard's bytes; default: its path or URL.

        Raises DataError if a shard is missing, or is not the one that was indexed.
        """
        decoded = np.empty(
            (len(samples), *self._form.shape), self._form.takes.dtype
        )  # numpy copies rows of bytes many times faster than torch
        for shard, rows in self._decoded(samples, content or self._content):
            decoded[rows] = shard.samples(samples[rows, 1])
        if self._form.has_masks:
            masks = torch.from_numpy(decoded[:, COLOURS])
            return torch.from_numpy(decoded[:, :COLOURS]), self._targets(masks)
        labels = [self.shards[number].labels[position] for number, position in samples.tolist()]
        return torch.from_numpy(decoded), self._targets(labels)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Call `read` for each batch of a plan, in other threads and ahead of its use. The next
        shards behind URLs are fetched meanwhile.

        Raises DataError like `read`, when it reaches the batch.
        """
        with (
            _threads(SHARDS_AHEAD, "shards") as fetching,
            # One fills a batch while the other keeps the decoders at work.
            _threads(min(self._decoders, BATCHES_AHEAD), "batches") as reading,
        ):
            ahead = _ShardsAhead(self._remote(plan), self._content, fetching)
            batches = (reading.submit(self.read, samples, ahead) for samples in plan)
            coming = deque(islice(batches, BATCHES_AHEAD))
            while coming:
                batch = WAITED.for_result(coming.popleft())
                coming.extend(islice(batches, 1))
                yield batch

    def _decoded(
        self, samples: np.ndarray, content: Callable[[ShardEntry], bytes]
    ) -> Iterator[tuple[DecodedShard, np.ndarray]]:
        """The shards that samples belong to, and which rows of the samples are theirs."""
        found = []
        for number in np.unique(samples[:, 0]):
            rows = np.flatnonzero(samples[:, 0] == number)
            entry = self.shards[number]
            shard = CACHE.get(entry.sha256, self._form, entry.samples, self.cache_bytes)
            found.append((entry, shard, rows, shard.missing(samples[rows, 1])))
        lacking = [(entry, shard) for entry, shard, _, missing in found if len(missing)]
        stored: dict[DecodedShard, EncodedShard] = {}
        self._for_all(functools.partial(self._open, content, stored), lacking)
        places = [
            (shard, stored[shard], place)
            for _, shard, _, missing in found
            for place in missing.tolist()
        ]
        self._for_all(functools.partial(decode, self._form), places)
        for _, shard, rows, missing in found:
            if len(missing):
                shard.close_if_decoded()
            yield shard, rows

    def _for_all(self, do: Callable[[Sequence[Item]], None], items: Sequence[Item]) -> None:
        """Call `do` with all items, in chunks, in the threads of the decoders."""
        size = min(MOST_TOGETHER, -(-len(items) // (self._decoders * JOBS_PER_DECODER)) or 1)
        jobs = [items[start : start + size] for start in range(0, len(items), size)]
        here = self._decoders == 1 or len(jobs) < 2
        for _ in map(do, jobs) if here else _decoders(self._decoders).map(do, jobs):
            pass

    def _open(
        self,
        content: Callable[[ShardEntry], bytes],
        stored: dict[DecodedShard, EncodedShard],
        shards: Sequence[tuple[ShardEntry, DecodedShard]],
    ) -> None:
        """Have the samples of shards at hand as they are `stored`: until they are decoded, also
        where another process decodes the last ones of a shard, which then forgets them.
        """
        for entry, shard in shards:
            url = resolve(self.index_folder, entry.path)
            stored[shard] = shard.open(url, functools.partial(self._load, entry, content))

    def _load(self, entry: ShardEntry, content: Callable[[ShardEntry], bytes]) -> EncodedShard:
        return open_shard(self.index_folder, entry, self._form.has_masks, content(entry))

    def _remote(self, plan: Sequence[np.ndarray]) -> list[ShardEntry]:
        """The shards behind URLs that a plan has something to decode from, by first use."""
        if not plan or not any(is_url(shard.path) for shard in self.shards):
            return []
        numbers, first_use = np.unique(np.concatenate(plan)[:, 0], return_index=True)
        shards = [self.shards[number] for number in numbers[np.argsort(first_use)]]
        return [
            shard
            for shard in shards
            if is_url(shard.path) and not CACHE.is_decoded(self._key(shard))
        ]

    def _key(self, shard: ShardEntry) -> Key:
        return shard.sha256, self._form.key


@functools.lru_cache(maxsize=1)
def _decoders(threads: int) -> ThreadPoolExecutor:
    """The threads that decode for all readers of this process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


@contextlib.contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads for as long as an epoch lasts; what has not begun at its end is left out."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _ShardsAhead:
    """Fetches shards in a thread pool, at most SHARDS_AHEAD at a time, in the order in which they
    are first needed; call it with a shard to get its bytes.
    """

    def __init__(
        self,
        shards: Sequence[ShardEntry],
        fetch: Callable[[ShardEntry], bytes],
        pool: ThreadPoolExecutor,
    ) -> None:
        self._waiting, self._fetch, self._pool = deque(shards), fetch, pool
        self._coming: dict[str, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._send_for_more()

    def __call__(self, shard: ShardEntry) -> bytes:
        with self._lock:
            coming = self._coming.pop(shard.sha256, None)
        content = self._fetch(shard) if coming is None else coming.result()
        self._send_for_more()
        return content

    def _send_for_more(self) -> None:
        with self._lock:
            while self._waiting and len(self._coming) < SHARDS_AHEAD:
                shard = self._waiting.popleft()
                self._coming[shard.sha256] = self._pool.submit(self._fetch, shard)
