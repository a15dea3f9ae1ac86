"""The sampled product (sampled.py) as one Triton kernel: x and g are read once, no product is
stored.

A program sums BLOCK_N entries over one chunk of the tokens; chunks are added afterwards in a fixed
order, so that equal inputs give equal bits. Entries are in the order of neurons, so neighbours
read neighbouring outputs of g; their columns of x are in one or two cache lines. Imported only
where it runs: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_N = 128
BLOCK_T = 32
PROGRAMS = 1024
"""Approximate number of programs: several for each multiprocessor of a large GPU."""


@triton.jit
def _sums_of_share(  # type: ignore[no-untyped-def]
    x_TC,
    gradient_TO,
    place_N,
    sums_SN,
    tokens,
    entries,
    outputs,
    x_stride,
    gradient_stride,
    share,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    entry_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_entry_N = entry_N < entries
    place = tl.load(place_N + entry_N, mask=is_entry_N, other=0)
    column_N, output_N = place // outputs, place % outputs
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, tokens)
    sum_N = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(first, end, BLOCK_T):
        token_T = start + tl.arange(0, BLOCK_T)
        wanted = (token_T < end)[:, None] & is_entry_N[None, :]
        x = tl.load(
            x_TC + token_T[:, None].to(tl.int64) * x_stride + column_N[None, :],
            mask=wanted,
            other=0.0,
        )
        gradient = tl.load(
            gradient_TO + token_T[:, None].to(tl.int64) * gradient_stride + output_N[None, :],
            mask=wanted,
            other=0.0,
        )
        sum_N += tl.sum(x.to(tl.float32) * gradient.to(tl.float32), axis=0)
    tl.store(sums_SN + tl.program_id(1) * entries + entry_N, sum_N, mask=is_entry_N)


def fused_sampled_product(
    x_TC: torch.Tensor, gradient_TO: torch.Tensor, place_N: torch.Tensor
) -> torch.Tensor:
    """Entries [N], float32, of x^T g at `place_N`; tokens of `x_TC` and `gradient_TO` may have any
    stride, their numbers lie side by side.
    """
    x_TC, gradient_TO = (
        each if each.stride(1) == 1 else each.contiguous() for each in (x_TC, gradient_TO)
    )
    tokens, entries = len(x_TC), len(place_N)
    blocks = triton.cdiv(entries, BLOCK_N)
    shares = max(1, min(PROGRAMS // blocks, triton.cdiv(tokens, BLOCK_T)))
    share = triton.cdiv(triton.cdiv(tokens, shares), BLOCK_T) * BLOCK_T
    shares = triton.cdiv(tokens, share)
    sums_SN = torch.empty(shares, entries, dtype=torch.float32, device=x_TC.device)
    _sums_of_share[blocks, shares](
        x_TC, gradient_TO, place_N, sums_SN, tokens, entries, gradient_TO.shape[1],
        x_TC.stride(0), gradient_TO.stride(0), share,
        BLOCK_N=BLOCK_N, BLOCK_T=BLOCK_T,
    )  # fmt: skip
    return sums_SN.sum(dim=0)
