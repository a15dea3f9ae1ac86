"""Dropout with its own random generator, so that training depends only on its seed, whatever else
this process has drawn.

The training loop sets a new seed for every step. So a resumed run needs no generator state, and
can resume on another kind of device, whose generator state would be incompatible.
"""

from __future__ import annotations

import torch
from torch import nn


class SeededDropout(nn.Module):
    """Zeroes a fraction of a tensor's entries in training and scales up the others; one instance
    serves all adapters of a model.
    """

    def __init__(self, share: float, seed: int) -> None:
        super().__init__()
        self.share, self.seed = share, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self._kept(x)
        return x if kept is None else x * kept.div_(1 - self.share)

    @property
    def factor(self) -> float:
        """What the kept entries are scaled up by."""
        return 1 / (1 - self.share) if self.training else 1.0

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """Zero a fraction of the entries of `x` in training, in place. Whoever calls this scales up
        the others by `factor`.
        """
        kept = self._kept(x)
        return x if kept is None else x.mul_(kept)

    def _kept(self, x: torch.Tensor) -> torch.Tensor | None:
        """One for entries that are kept, zero for others; None where all are."""
        if not self.training or not self.share:
            return None
        return torch.empty_like(x).bernoulli_(1 - self.share, generator=self.generator(x.device))

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def generators(self) -> list[torch.Generator]:
        """Those that have been used, one per device."""
        return list(self._generators.values())

    def reseed(self, seed: int) -> None:
        """Restart the generators of all devices from this seed."""
        self.seed = seed
        for generator in self._generators.values():
            generator.manual_seed(seed)
