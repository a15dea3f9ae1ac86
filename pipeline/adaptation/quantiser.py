"""The b-bit quantiser: parameters train as latent floats and are used exactly as they will be stored.

Per matrix, z = (w - mean) / (sd + 1e-5) is replaced by the nearest level of a fixed codebook for N(0, 1), and w_hat = Q(z) * sd + mean. Gradients
pass Q unchanged (straight-through) and also flow through mean and sd. 16 bits round to half precision, 32 bits are plain floats.
Source: Binary Adapter (arXiv 2307.16867), section 3; see `pipeline.packs.codebook` for the levels.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.packs.codebook import levels, thresholds
from pipeline.spec import Bits

EPSILON = 1e-5
SMALLEST_VARIANCE = 1e-20  # keeps the gradient of sd finite where all values are equal


class _RoundToHalf(torch.autograd.Function):
    """Half precision's value, the identity's gradient."""

    @staticmethod
    def forward(ctx: Any, latent: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return latent.half().float()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient


class _Quantise(torch.autograd.Function):
    """w_hat = Q(z) sd + mean, with dQ/dz = 1 and everything else differentiated; written out, since it runs for every tensor in every step."""

    @staticmethod
    def forward(ctx: Any, latent_GN: torch.Tensor, level_values: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        mean_G1, sd_G1 = statistics(latent_GN)
        z_GN = (latent_GN - mean_G1) / (sd_G1 + EPSILON)
        rounded_GN = level_values[torch.bucketize(z_GN, edges, right=True)]
        ctx.save_for_backward(z_GN, rounded_GN, sd_G1)
        return rounded_GN * sd_G1 + mean_G1

    @staticmethod
    def backward(ctx: Any, gradient_GN: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        z_GN, rounded_GN, sd_G1 = ctx.saved_tensors
        values = z_GN.shape[1]
        shrink_G1 = sd_G1 / (sd_G1 + EPSILON)
        mean_gradient_G1 = (1 - shrink_G1) * gradient_GN.sum(dim=1, keepdim=True)
        sd_gradient_G1 = (gradient_GN * (rounded_GN - shrink_G1 * z_GN)).sum(dim=1, keepdim=True)
        sd_slope_GN = z_GN / (max(values - 1, 1) * shrink_G1)  # d sd / d w = (w - mean) / ((N - 1) sd)
        return gradient_GN * shrink_G1 + mean_gradient_G1 / values + sd_gradient_G1 * sd_slope_GN, None, None


@functools.cache
def _codebook(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.array(levels(bits))), torch.from_numpy(np.array(thresholds(bits)))


def grouped(tensor: torch.Tensor) -> torch.Tensor:
    """View as [G, N]: one group per trailing matrix of a 3-D tensor, one in all for vectors and matrices."""
    return tensor.reshape(tensor.shape[0] if tensor.ndim == 3 else 1, -1)


def statistics(values_GN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased standard deviation of each group, both [G, 1]."""
    mean_G1 = values_GN.mean(dim=1, keepdim=True)
    variance_G1 = (values_GN - mean_G1).square().sum(dim=1, keepdim=True) / max(values_GN.shape[1] - 1, 1)
    return mean_G1, variance_G1.clamp_min(SMALLEST_VARIANCE).sqrt()


def quantise(latent: torch.Tensor, bits: Bits) -> torch.Tensor:
    """The stored value of `latent`, with straight-through gradients; same shape."""
    if bits == 32:
        return latent
    if bits == 16:
        return _RoundToHalf.apply(latent)
    level_values, edges = (tensor.to(latent.device) for tensor in _codebook(bits))
    return _Quantise.apply(grouped(latent), level_values, edges).reshape(latent.shape)


@torch.no_grad()
def encode(latent: torch.Tensor, bits: Bits) -> tuple[np.ndarray, np.ndarray | None]:
    """What a pack stores of `latent`: flat codes (uint8, float16 or float32) and, below 16 bits, scales float32 [G, 2] of (mean, sd)."""
    latent = latent.detach().cpu()
    if bits >= 16:
        return latent.reshape(-1).numpy().astype(np.float16 if bits == 16 else np.float32), None
    latent_GN = grouped(latent)
    mean_G1, sd_G1 = statistics(latent_GN)
    z_GN = (latent_GN - mean_G1) / (sd_G1 + EPSILON)
    codes = torch.bucketize(z_GN, _codebook(bits)[1], right=True).to(torch.uint8)
    return codes.reshape(-1).numpy(), torch.cat([mean_G1, sd_G1], dim=1).numpy()


class Quantised(nn.Module):
    """A trained tensor of `bits` bits. Calling it gives the value as stored; `latent` is what the optimiser moves."""

    def __init__(self, initial: torch.Tensor, bits: Bits) -> None:
        super().__init__()
        self.latent = nn.Parameter(initial)
        self.bits: Bits = bits
        self.is_stored = False

    def forward(self) -> torch.Tensor:
        return self.latent if self.is_stored else quantise(self.latent, self.bits)

    @torch.no_grad()
    def load_stored(self, values: torch.Tensor) -> None:
        """Take values read from a pack: from now on they are used as they are."""
        self.latent.copy_(values)
        self.is_stored = True


def small_change(shape: tuple[int, ...], bits: Bits, generator: torch.Generator) -> Quantised:
    """A change added to a frozen tensor: zero at 16 and 32 bits; below, tiny noise, since a zero tensor has no sign to learn."""
    initial = torch.zeros(shape) if bits >= 16 else torch.empty(shape).normal_(0, 1e-4, generator=generator)
    return Quantised(initial, bits)
