"""The b-bit quantiser: parameters train as latent floats and are used exactly as they will be
stored.

Per matrix, z = (w - mean) / (std + 1e-5) is replaced by the nearest level of a fixed codebook for
N(0, 1), and w_hat = Q(z) * std + mean. Gradients pass Q unchanged (straight-through) and also flow
through mean and std, which are used as a pack keeps them: in half precision. 16 bits round to half
precision, 32 bits are plain floats. Without a mean, z = w / (rms + 1e-5) and w_hat = Q(z) * rms.
Source: Binary Adapter (arXiv 2307.16867), section 3; see `pipeline.packs.codebook` for the levels.

All tensors of one width are quantised at once, as one flat vector of N values in G runs: one per
matrix or, with `by_row`, one per row. Sums are taken in float64.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from pipeline.packs.codebook import Codebook, levels, thresholds
from pipeline.specs import Bits

EPSILON = 1e-5
SMALLEST_VARIANCE = 1e-20  # keeps the gradient of std finite where all values are equal


@functools.cache
def _codebook(
    bits: int, codebook: Codebook, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(levels(bits, codebook)).to(device), torch.from_numpy(
        thresholds(bits, codebook)
    ).to(device)


def run_sums(values_N: torch.Tensor, lengths_G: torch.Tensor) -> torch.Tensor:
    """Sum of each run, float64 [G]."""
    return torch.segment_reduce(values_N.double(), "sum", lengths=lengths_G, unsafe=True)


def statistics(
    values_N: torch.Tensor, lengths_G: torch.Tensor, has_mean: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased standard deviation of each run, float32 [G]; 0 and the root of the mean
    square where there is no mean.
    """
    mean_G = (run_sums(values_N, lengths_G) / lengths_G).to(values_N.dtype) * has_mean
    centred_N = values_N - mean_G.repeat_interleave(lengths_G, output_size=len(values_N))
    variance_G = run_sums(centred_N.square(), lengths_G) / _degrees_of_freedom(lengths_G, has_mean)
    return mean_G, variance_G.clamp_min(SMALLEST_VARIANCE).sqrt().to(values_N.dtype)


def _degrees_of_freedom(lengths_G: torch.Tensor, has_mean: bool) -> torch.Tensor:
    return (lengths_G - 1).clamp_min(1) if has_mean else lengths_G


def _as_stored(statistic_G: torch.Tensor) -> torch.Tensor:
    """A statistic as a pack stores it."""
    return statistic_G.half().to(statistic_G.dtype)


def _standardise(
    values_N: torch.Tensor, lengths_G: torch.Tensor, has_mean: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z [N], mean [G] and std [G]."""
    mean_G, sd_G = statistics(values_N, lengths_G, has_mean)
    mean_N, scale_N = (
        each.repeat_interleave(lengths_G, output_size=len(values_N))
        for each in (mean_G, sd_G + EPSILON)
    )
    return (values_N - mean_N) / scale_N, mean_G, sd_G


class _RoundToHalf(torch.autograd.Function):
    """Rounds to half precision; its gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, latent: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return latent.half().to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient


class _Quantise(torch.autograd.Function):
    """w_hat = Q(z) std + mean, with dQ/dz = 1 and everything else differentiated; written out,
    since it runs in every step.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        latent_N: torch.Tensor,
        lengths_G: torch.Tensor,
        bits: int,
        codebook: Codebook,
        has_mean: bool,
    ) -> torch.Tensor:
        level_values, edges = _codebook(bits, codebook, latent_N.device)
        z_N, mean_G, sd_G = _standardise(latent_N, lengths_G, has_mean)
        rounded_N = level_values.to(latent_N.dtype)[torch.bucketize(z_N, edges, right=True)]
        ctx.save_for_backward(z_N, rounded_N, sd_G, lengths_G)
        ctx.has_mean = has_mean
        mean_N, sd_N = (
            each.repeat_interleave(lengths_G, output_size=len(latent_N))
            for each in (_as_stored(mean_G), _as_stored(sd_G))
        )
        return rounded_N * sd_N + mean_N

    @staticmethod
    def backward(ctx: Any, gradient_N: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:  # type: ignore[override]
        z_N, rounded_N, sd_G, lengths_G = ctx.saved_tensors
        shrink_G = sd_G / (sd_G + EPSILON)
        shrink_N = shrink_G.repeat_interleave(lengths_G, output_size=len(z_N))
        mean_term_G = (1 - shrink_G) * run_sums(gradient_N, lengths_G) / lengths_G * ctx.has_mean
        # d std / d w = (w - mean) / (f std) = z / (f shrink), with f degrees of freedom
        sd_term_G = run_sums(gradient_N * (rounded_N - shrink_N * z_N), lengths_G) / (
            _degrees_of_freedom(lengths_G, ctx.has_mean) * shrink_G
        )
        mean_term_N, sd_term_N = (
            each.to(z_N.dtype).repeat_interleave(lengths_G, output_size=len(z_N))
            for each in (mean_term_G, sd_term_G)
        )
        return gradient_N * shrink_N + mean_term_N + sd_term_N * z_N, None, None, None, None


def quantise(
    latent_N: torch.Tensor,
    lengths_G: torch.Tensor,
    bits: Bits,
    codebook: Codebook = "median",
    has_mean: bool = True,
) -> torch.Tensor:
    """The stored values of `latent_N`, with straight-through gradients; `lengths_G` are the values
    of each run, in order.
    """
    if bits == 32:
        return latent_N
    if bits == 16:
        return _RoundToHalf.apply(latent_N)
    return _Quantise.apply(latent_N, lengths_G, bits, codebook, has_mean)


@torch.no_grad()
def encode(
    latent_N: torch.Tensor,
    lengths_G: torch.Tensor,
    bits: Bits,
    codebook: Codebook = "median",
    has_mean: bool = True,
) -> tuple[np.ndarray, np.ndarray | None]:
    """What a pack stores: codes [N] (uint8, float16 or float32) and, below 16 bits, scales float32
    [G, 2] of (mean, std), as rounded.
    """
    latent_N, lengths_G = latent_N.detach().cpu(), lengths_G.cpu()
    if bits >= 16:
        return latent_N.numpy().astype(np.float16 if bits == 16 else np.float32), None
    z_N, mean_G, sd_G = _standardise(latent_N, lengths_G, has_mean)
    codes_N = torch.bucketize(z_N, _codebook(bits, codebook, z_N.device)[1], right=True).to(
        torch.uint8
    )
    return codes_N.numpy(), torch.stack([_as_stored(mean_G), _as_stored(sd_G)], dim=1).numpy()
