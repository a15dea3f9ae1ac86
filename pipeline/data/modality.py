"""Modality: what a sample is, from the file to the network.

One object says everything that differs between images and other samples. A backbone has the one
that it takes; readers decode by it, training augments by it, and packs record it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from pipeline.specs import Augmentation


class Modality(ABC):
    """What one backbone takes. Legend: B samples, each of `shape`."""

    name: ClassVar[str]
    noun: ClassVar[str]
    a_noun: ClassVar[str]
    extensions: ClassVar[tuple[str, ...]]
    expected: ClassVar[str]
    """The formats of files, for error messages."""
    column: ClassVar[str]
    """The column of a table of samples, as MLflow's models take them."""
    arrays: ClassVar[str]
    """The samples of a batch as one array, for error messages."""
    example_file: ClassVar[str]
    """What a file may be called, for examples of commands."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of a decoded sample."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """The type of a decoded sample's numbers."""

    @staticmethod
    @abstractmethod
    def stored(content: bytes, name: str) -> bytes:
        """What shards keep of a file. Raises DataError naming `name` if it cannot be decoded."""

    @staticmethod
    @abstractmethod
    def is_batch(array: np.ndarray) -> bool:
        """Whether an array holds samples, one after another, as `arrays` says."""

    @staticmethod
    @abstractmethod
    def example() -> bytes:
        """A small file, for examples of input."""

    @abstractmethod
    def decode_stored(self, content: bytes, name: str) -> np.ndarray:
        """A sample from what shards keep. Raises DataError naming `name`."""

    def decode_into(self, samples: np.ndarray, stored: Iterable[tuple[str, bytes]]) -> None:
        """Write `samples` [N, ...] from their N names and what shards keep of them. Raises
        DataError naming one that cannot be decoded.
        """
        for row, (name, content) in enumerate(stored):
            samples[row] = self.decode_stored(content, name)

    @abstractmethod
    def decode(self, source: Any, name: str = "") -> np.ndarray:
        """A sample of `shape` from a file's path or content, or from an array. Raises DataError
        naming `name`.
        """

    @property
    @abstractmethod
    def key(self) -> str:
        """Differs where the same content decodes to other bytes; may be part of a file's name."""

    @abstractmethod
    def normaliser(self) -> nn.Module:
        """A module from decoded or augmented samples [B, ...] to what the network takes."""

    @abstractmethod
    def augment(
        self,
        samples: torch.Tensor,
        targets: torch.Tensor,
        generator: torch.Generator,
        flip: bool,
        kind: Augmentation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A random variant of each decoded sample, float32, and of its target; `flip` allows
        mirroring.
        """

    @abstractmethod
    def probe(self, count: int) -> np.ndarray:
        """Fixed pseudo-random decoded samples."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a pack records: enough to decode and normalise alike."""

    @property
    @abstractmethod
    def identity(self) -> list[Any]:
        """What decoded and normalised samples depend on, as JSON values."""

    @abstractmethod
    def misfit(self, facts: dict[str, Any]) -> str | None:
        """What a pack with these facts takes, and what is given instead; None if they agree."""

    def noise(self, count: int) -> torch.Tensor:
        """Fixed pseudo-random input of a network, float32."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, *self.shape, generator=generator)

    def two_views(
        self,
        samples: torch.Tensor,
        targets: torch.Tensor,
        generator: torch.Generator,
        flip: bool,
        kind: Augmentation = "strong",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two variants of each sample and target, [2B, ...], first ones before second ones."""
        both = torch.cat([samples, samples]), torch.cat([targets, targets])
        return self.augment(*both, generator, flip, kind)
