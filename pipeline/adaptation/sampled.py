"""The sampled product: of x^T g only the entries that are wanted.

    s[n] = sum_t x[t, c[n]] * g[t, o[n]]        n: an entry (c[n], o[n]) of the [C, O] product, at place c[n] * O + o[n]

It is the gradient of a layer's connections: x are the inputs that any neuron chose, g the gradient of the layer's output. One function, three ways:

- On a CPU, the product over the chosen columns is made whole and read at the places. A neuron's dot product alone is no cheaper: gathering a column
  for every neuron moves more memory than the product computes. A compiled kernel that does both at once was measured to save 1 % of a step.
- On a GPU, with few columns, a fused kernel reads x and g once and writes N sums (triton_sampled.py).
- On a GPU, with many columns, each row of x is many cache lines and gathering from it costs more than the tensor cores' product, which is dropped
  at once.

Shapes: T tokens, C columns of x, O outputs, N entries.
"""

from __future__ import annotations

import torch

FUSED_COLUMNS = 128
"""Columns up to which the fused kernel gathers from one or two cache lines a token."""


def sampled_product(x_TC: torch.Tensor, gradient_TO: torch.Tensor, place_N: torch.Tensor) -> torch.Tensor:
    """The entries [N] of x^T g at `place_N`, in the type of `x_TC`, or float32 from the fused kernel."""
    if x_TC.is_cuda and x_TC.shape[1] <= FUSED_COLUMNS:
        from pipeline.adaptation.triton_sampled import fused_sampled_product

        return fused_sampled_product(x_TC, gradient_TO, place_N)
    return (x_TC.T @ gradient_TO).take(place_N)
