"""Dropout that draws from a generator of its own, so that training depends on its seed alone,
whatever else this process has drawn.

The training loop gives a new seed for every step. So a run that goes on needs no state of any
generator, and may go on on another kind of device, whose generator's state would not fit.
"""

from __future__ import annotations

import torch
from torch import nn


class SeededDropout(nn.Module):
    """Zeroes a share of a tensor's entries in training and scales the others up; one instance
    serves all adapters of a model.
    """

    def __init__(self, share: float, seed: int) -> None:
        super().__init__()
        self.share, self.seed = share, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.share:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.share, generator=self.generator(x.device))
        return x * kept.div_(1 - self.share)

    def generator(self, device: torch.device) -> torch.Generator:
        """What it draws from on a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def reseed(self, seed: int) -> None:
        """Draw anew, from this seed, on whatever device."""
        self.seed = seed
        for generator in self._generators.values():
            generator.manual_seed(seed)
