"""The b-bit quantiser: parameters train as latent floats and are used exactly as they will be
stored.

Per matrix, z = (w - mean) / (std + 1e-5) is replaced by the nearest level of a fixed codebook for
N(0, 1), and w_hat = Q(z) * std + mean. Gradients pass Q unchanged (straight-through) and also flow
through mean and std, which are used as a pack keeps them: in half precision. 16 bits round to half
precision, 32 bits are plain floats. Without a mean, z = w / (rms + 1e-5) and w_hat = Q(z) * rms.
Source: Binary Adapter (arXiv 2307.16867), section 3; see `pipeline.packs.codebook` for the levels.

All tensors are quantised at once, as one flat vector of N values in G runs: one per matrix or, with
`by_row`, one per row. Those of each width and codebook are a slice of it. Sums are taken in
float64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Slice(NamedTuple):
    """Consecutive values that are rounded to the same levels."""

    values: int
    bits: int
    codebook: Codebook


class Runs(NamedTuple):
    """Runs of values, in order: the length of each, the degrees of freedom of its standard
    deviation, where it starts [G + 1] (the last number is N), and the run of each value (int32).
    """

    lengths_G: torch.Tensor
    freedom_G: torch.Tensor
    starts: torch.Tensor
    number_N: torch.Tensor


def runs_of(lengths_G: torch.Tensor, has_mean: bool = True) -> Runs:
    """Runs of these lengths, from each of which a mean is taken or not."""
    numbers_G = torch.arange(len(lengths_G), dtype=torch.int32, device=lengths_G.device)
    return Runs(
        lengths_G,
        (lengths_G - 1).clamp_min(1) if has_mean else lengths_G,
        torch.cat([lengths_G.new_zeros(1), lengths_G.cumsum(0)]),
        numbers_G.repeat_interleave(lengths_G),
    )


def _run_sums(terms_N: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Sum of each run, float64 [G], of float64 terms. Starts rather than lengths are given, from
    which a GPU would find the starts.
    """
    return torch.segment_reduce(terms_N, "sum", offsets=runs.starts, unsafe=True)


def _products(a_N: torch.Tensor, b_N: torch.Tensor) -> torch.Tensor:
    """Products, rounded to the type of the factors, in float64."""
    return torch.mul(a_N, b_N, out=torch.empty_like(a_N, dtype=torch.float64))


def _codes(z_N: torch.Tensor, bits: int, codebook: Codebook) -> torch.Tensor:
    """Numbers of the nearest levels, int32 [N]."""
    edges = _codebook(bits, codebook, z_N.device)[1]
    return torch.bucketize(z_N, edges, right=True, out_int32=True)


def _rounded(z_N: torch.Tensor, slices: Sequence[Slice]) -> torch.Tensor:
    """The nearest levels."""
    rounded_N = torch.empty_like(z_N)
    sizes = [values for values, _, _ in slices]
    pieces = zip(z_N.split(sizes), rounded_N.split(sizes), slices, strict=True)
    for z, into, (_, bits, codebook) in pieces:
        level_values = _codebook(bits, codebook, z.device)[0].to(z.dtype)
        torch.index_select(level_values, 0, _codes(z, bits, codebook), out=into)
    return rounded_N


class _Standardised(NamedTuple):
    """z [N]; mean and standard deviation as a pack stores them, of each run [2, G] and of each
    value's run [2, N]; and by what factor the quantiser shrinks deviations, std / (std + 1e-5) [G].
    """

    z_N: torch.Tensor
    stored_2G: torch.Tensor
    stored_2N: torch.Tensor
    shrink_G: torch.Tensor


def _standardise(latent_N: torch.Tensor, runs: Runs, has_mean: bool) -> _Standardised:
    """With the unbiased standard deviation or, without a mean, the root of the mean square."""
    exact_2G, of_run_3G = (latent_N.new_empty(rows, len(runs.lengths_G)) for rows in (2, 3))
    mean_G, sd_G = exact_2G
    if has_mean:
        torch.div(_run_sums(latent_N.double(), runs), runs.lengths_G, out=mean_G)
        latent_N = latent_N - mean_G.index_select(0, runs.number_N)
    else:
        mean_G.zero_()
    variance_G = _run_sums(_products(latent_N, latent_N), runs) / runs.freedom_G
    torch.sqrt(variance_G.clamp_min_(SMALLEST_VARIANCE), out=sd_G)
    stored_2G = of_run_3G[:2].copy_(exact_2G.half())
    divisor_G = torch.add(sd_G, EPSILON, out=of_run_3G[2])
    of_value_3N = of_run_3G.index_select(1, runs.number_N)
    return _Standardised(latent_N / of_value_3N[2], stored_2G, of_value_3N[:2], sd_G / divisor_G)


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
        runs: Runs,
        slices: Sequence[Slice],
        has_mean: bool,
    ) -> torch.Tensor:
        z_N, _, (mean_N, sd_N), shrink_G = _standardise(latent_N, runs, has_mean)
        rounded_N = _rounded(z_N, slices)
        ctx.save_for_backward(z_N, rounded_N, shrink_G)
        ctx.runs, ctx.has_mean = runs, has_mean
        return (rounded_N * sd_N).add_(mean_N)

    @staticmethod
    def backward(ctx: Any, gradient_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (z_N, rounded_N, shrink_G), runs = ctx.saved_tensors, ctx.runs
        shrink_N = shrink_G.index_select(0, runs.number_N)
        # d std / d w = (w - mean) / (f std) = z / (f shrink), with f degrees of freedom
        sd_slope_N = rounded_N - shrink_N * z_N
        sd_sums_G = _run_sums(_products(gradient_N, sd_slope_N), runs)
        terms_2G = z_N.new_empty(2, len(shrink_G))
        torch.div(sd_sums_G, runs.freedom_G * shrink_G, out=terms_2G[1])
        if ctx.has_mean:
            mean_sums_G = (1 - shrink_G) * _run_sums(gradient_N.double(), runs)
            torch.div(mean_sums_G, runs.lengths_G, out=terms_2G[0])
            mean_term_N, sd_term_N = terms_2G.index_select(1, runs.number_N)
            latent_gradient_N = (gradient_N * shrink_N).add_(mean_term_N)
        else:
            sd_term_N = terms_2G[1].index_select(0, runs.number_N)
            latent_gradient_N = gradient_N * shrink_N
        return latent_gradient_N.add_(sd_term_N * z_N), None, None, None


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
    slices = [Slice(len(latent_N), bits, codebook)]
    return quantise_slices(latent_N, runs_of(lengths_G, has_mean), slices, has_mean)


def quantise_slices(
    latent_N: torch.Tensor, runs: Runs, slices: Sequence[Slice], has_mean: bool
) -> torch.Tensor:
    """As `quantise` of each of the slices of a vector, below 16 bits."""
    return _Quantise.apply(latent_N, runs, slices, has_mean)  # type: ignore[no-any-return]


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
    found = _standardise(latent_N, runs_of(lengths_G, has_mean), has_mean)
    codes_N = _codes(found.z_N, bits, codebook).to(torch.uint8)
    return codes_N.numpy(), found.stored_2G.T.contiguous().numpy()
