"""The sampled product: selected entries of x^T g.

    s[n] = sum_t x[t, c[n]] * g[t, o[n]]        n: the entry (c[n], o[n]) of the [C, O] product,
                                                whose flat index is c[n] * O + o[n]

It is the gradient of a layer's connections: x holds the inputs that any neuron selected, g the
gradient of the layer's output. There are three implementations:

- On a CPU, the dense product over the selected columns is computed and indexed. Separate dot
  products are no cheaper: gathering a column per neuron is bound by memory. A compiled kernel that
  fuses both was measured to save 1 % of a step.
- On a GPU, with few columns, a fused kernel reads x and g once and writes N sums
  (triton_sampled.py).
- On a GPU, with many columns, each row of x spans many cache lines, and gathering from it costs
  more than the dense product on tensor cores. The dense product is also the fallback where Triton
  is unavailable: it needs a C compiler and Python's headers on first use.

Shapes: T tokens, C columns of x, O outputs, N entries.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

SampledProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FUSED_COLUMNS = 128
"""Largest number of columns for which the fused kernel gathers from one or two cache lines per
token.
"""


def sampled_product(
    x_TC: torch.Tensor, gradient_TO: torch.Tensor, place_N: torch.Tensor
) -> torch.Tensor:
    """The entries [N] of x^T g at `place_N`, in the type of `x_TC`, or float32 from the fused
    kernel.
    """
    is_fused = x_TC.device.type != "cpu" and x_TC.shape[1] <= FUSED_COLUMNS
    product = (fused_kernel(x_TC.device) if is_fused else None) or plain_sampled_product
    return product(x_TC, gradient_TO, place_N)


def plain_sampled_product(
    x_TC: torch.Tensor, gradient_TO: torch.Tensor, place_N: torch.Tensor
) -> torch.Tensor:
    """`sampled_product` by way of the dense product."""
    return (x_TC.T @ gradient_TO).take(place_N)


@functools.cache
def fused_kernel(device: torch.device) -> SampledProduct | None:
    """The fused kernel, after a trial run on `device`; None, with a logged warning, if that
    fails.
    """
    try:
        from pipeline.adaptation.kernels.triton_sampled import fused_sampled_product

        ones = torch.ones(2, 2, device=device)
        fused_sampled_product(ones, ones, torch.zeros(1, dtype=torch.int64, device=device))
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # an import, a compiler, a driver: Triton has no type of its own for what it lacks
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        logging.getLogger(__name__).warning(
            "connections train without the fused Triton kernel, which cannot be used here (%s); it"
            " needs Triton, a C compiler and Python's headers",
            reason,
        )
        return None
    return fused_sampled_product
