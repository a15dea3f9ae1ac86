"""A shard's samples in memory, each decoded when it is first asked for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.encoded_shard import EncodedShard
from pipeline.data.masks import decode_mask
from pipeline.data.modality import Modality
from pipeline.data.quoting import shortened

COLOURS = 3
"""Channels of an image; a mask is a fourth."""


@dataclass(frozen=True)
class Form:
    """How a shard's samples are decoded: as what a network `takes`, with a mask as a fourth channel
    where `has_masks`.
    """

    takes: Modality
    has_masks: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample in memory."""
        shape = self.takes.shape
        return (COLOURS + 1, *shape[1:]) if self.has_masks else shape

    @property
    def key(self) -> str:
        """Differs where the same content decodes to other bytes."""
        return f"{self.takes.key}-{self.shape[0]}"

    def size_bytes(self, samples: int) -> int:
        """Bytes of the memory that a shard needs."""
        return samples * (math.prod(self.shape) * self.takes.dtype.itemsize + 1)


def decode(form: Form, places: Sequence[tuple[DecodedShard, EncodedShard, int]]) -> None:
    """Decode samples at positions of shards, and their masks. Raises DataError naming one that
    cannot be decoded.
    """
    samples = np.empty((len(places), *form.shape), form.takes.dtype)

    def contents() -> Iterator[tuple[str, bytes]]:
        for row, (_, encoded, position) in enumerate(places):
            name = f"{encoded.url}: {shortened(encoded.keys[position])}"
            content, *mask = encoded.sample(position)
            for part in mask:
                samples[row, COLOURS] = decode_mask(part, form.shape[-1], name)
            yield name, content

    form.takes.decode_into(samples[:, :COLOURS] if form.has_masks else samples, contents())
    for (shard, _, position), sample in zip(places, samples, strict=True):
        shard.keep(position, sample)


class DecodedShard:
    """The samples of a shard. Safe to share between threads, and its memory between processes:
    whoever decodes a sample twice writes the same bytes.

    Args:
        memory: uint8 [bytes of N samples + N], the samples and for each whether it is decoded;
            zeros at first.
    """

    def __init__(self, memory: np.ndarray, samples: int, form: Form) -> None:
        content, self._is_decoded = memory[:-samples], memory[-samples:]
        self._samples = content.view(form.takes.dtype).reshape(samples, *form.shape)
        self._form = form
        self._encoded: EncodedShard | None = None
        self._lock = threading.Lock()

    @property
    def is_decoded(self) -> bool:
        """Whether all samples are decoded."""
        return bool(self._is_decoded.all())

    def missing(self, positions: np.ndarray) -> np.ndarray:
        """Those of the positions whose samples are not decoded."""
        return positions[self._is_decoded[positions] == 0]

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Decoded samples [B, ...]."""
        return self._samples[positions]

    def open(self, url: str, load: Callable[[], EncodedShard]) -> EncodedShard:
        """The samples as they are stored: those at `url`, because the place where the same content
        was found before may be gone. Raises DataError.
        """
        with self._lock:
            if self._encoded is None or self._encoded.url != url:
                self._encoded = load()
            return self._encoded

    def keep(self, position: int, sample: np.ndarray) -> None:
        """Keep a decoded sample, with its mask."""
        self._samples[position] = sample
        self._is_decoded[position] = 1

    def close_if_decoded(self) -> None:
        """Forget the samples as they are stored, once all of them are decoded."""
        if self.is_decoded:
            with self._lock:
                self._encoded = None
