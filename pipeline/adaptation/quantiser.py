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


def run_numbers(lengths_G: torch.Tensor) -> torch.Tensor:
    """The run of each value, int32 [N]."""
    runs = torch.arange(len(lengths_G), dtype=torch.int32, device=lengths_G.device)
    return runs.repeat_interleave(lengths_G)


def run_sums(values_N: torch.Tensor, lengths_G: torch.Tensor) -> torch.Tensor:
    """Sum of each run, float64 [G]."""
    return torch.segment_reduce(values_N.double(), "sum", lengths=lengths_G, unsafe=True)


def _of_each(run_N: torch.Tensor, *statistics_G: torch.Tensor) -> torch.Tensor:
    """For each of some statistics, that of every value's run, [statistics, N]."""
    return torch.stack(statistics_G).index_select(1, run_N)


def _degrees_of_freedom(lengths_G: torch.Tensor, has_mean: bool) -> torch.Tensor:
    return (lengths_G - 1).clamp_min(1) if has_mean else lengths_G


def _as_stored(mean_G: torch.Tensor, sd_G: torch.Tensor) -> torch.Tensor:
    """The statistics [2, G] as a pack stores them."""
    return torch.stack([mean_G, sd_G]).half().to(sd_G.dtype)


def _standardise(
    values_N: torch.Tensor, lengths_G: torch.Tensor, run_N: torch.Tensor, has_mean: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z [N], and mean and unbiased standard deviation of each run [G]; 0 and the root of the mean
    square where there is no mean.
    """
    if has_mean:
        mean_G = (run_sums(values_N, lengths_G) / lengths_G).to(values_N.dtype)
        values_N = values_N - mean_G.index_select(0, run_N)
    variance_G = run_sums(values_N.square(), lengths_G) / _degrees_of_freedom(lengths_G, has_mean)
    sd_G = variance_G.clamp_min(SMALLEST_VARIANCE).sqrt().to(values_N.dtype)
    z_N = values_N / (sd_G + EPSILON).index_select(0, run_N)
    return z_N, mean_G if has_mean else torch.zeros_like(sd_G), sd_G


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
        run_N: torch.Tensor,
        bits: int,
        codebook: Codebook,
        has_mean: bool,
    ) -> torch.Tensor:
        level_values, edges = _codebook(bits, codebook, latent_N.device)
        z_N, mean_G, sd_G = _standardise(latent_N, lengths_G, run_N, has_mean)
        rounded_N = level_values.to(latent_N.dtype)[torch.bucketize(z_N, edges, right=True)]
        ctx.save_for_backward(z_N, rounded_N, sd_G, lengths_G, run_N)
        ctx.has_mean = has_mean
        mean_N, sd_N = _as_stored(mean_G, sd_G).index_select(1, run_N)
        return rounded_N * sd_N + mean_N

    @staticmethod
    def backward(ctx: Any, gradient_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        z_N, rounded_N, sd_G, lengths_G, run_N = ctx.saved_tensors
        shrink_G = sd_G / (sd_G + EPSILON)
        shrink_N = shrink_G.index_select(0, run_N)
        # d std / d w = (w - mean) / (f std) = z / (f shrink), with f degrees of freedom
        sd_term_G = run_sums(gradient_N * (rounded_N - shrink_N * z_N), lengths_G) / (
            _degrees_of_freedom(lengths_G, ctx.has_mean) * shrink_G
        )
        if ctx.has_mean:
            mean_term_G = (1 - shrink_G) * run_sums(gradient_N, lengths_G) / lengths_G
            mean_term_N, sd_term_N = _of_each(run_N, mean_term_G, sd_term_G).to(z_N.dtype)
            latent_gradient_N = gradient_N * shrink_N + mean_term_N + sd_term_N * z_N
        else:
            sd_term_N = sd_term_G.to(z_N.dtype).index_select(0, run_N)
            latent_gradient_N = gradient_N * shrink_N + sd_term_N * z_N
        return latent_gradient_N, None, None, None, None, None


def quantise(
    latent_N: torch.Tensor,
    lengths_G: torch.Tensor,
    bits: Bits,
    codebook: Codebook = "median",
    has_mean: bool = True,
    run_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The stored values of `latent_N`, with straight-through gradients; `lengths_G` are the values
    of each run, in order, `run_N` their `run_numbers`, where they are known.
    """
    if bits == 32:
        return latent_N
    if bits == 16:
        return _RoundToHalf.apply(latent_N)
    run_N = run_numbers(lengths_G) if run_N is None else run_N
    return _Quantise.apply(latent_N, lengths_G, run_N, bits, codebook, has_mean)


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
    z_N, mean_G, sd_G = _standardise(latent_N, lengths_G, run_numbers(lengths_G), has_mean)
    codes_N = torch.bucketize(z_N, _codebook(bits, codebook, z_N.device)[1], right=True).to(
        torch.uint8
    )
    return codes_N.numpy(), _as_stored(mean_G, sd_G).T.contiguous().numpy()
