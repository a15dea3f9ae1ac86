"""Connections: a layer's frozen weight with a few selected entries that train (GPS, arXiv 2312.10136), and its bias.

    y = (W + V) x + b        V is zero but for v[o, k] at column index[o, k]

The forward pass is the plain dense layer on a weight with the changed entries written in. The backward pass hands gradients to the short vector
of values only; the frozen weight itself never has one. Linear and Conv2d layers share the code: a convolution's weight is seen as
[out, in * kh * kw]. Shapes: O outputs (neurons), I inputs of a neuron, K kept connections, T tokens or pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import grad as nn_grad

from pipeline.adaptation.quantiser import small_change
from pipeline.spec import Bits

TunableLayer = nn.Linear | nn.Conv2d


def dense_weight_gradient(layer: TunableLayer, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of the layer's weight as [O, I], from its input and its output's gradient."""
    if isinstance(layer, nn.Linear):
        return gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    weight_gradient = nn_grad.conv2d_weight(x, list(layer.weight.shape), gradient, layer.stride, layer.padding, layer.dilation, layer.groups)
    return weight_gradient.reshape(layer.weight.shape[0], -1)


def _input_gradient(layer: TunableLayer, x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return gradient @ weight
    return nn_grad.conv2d_input(list(x.shape), weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups)


def apply_layer(layer: TunableLayer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The plain dense layer on another weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


class _ConnectedProduct(torch.autograd.Function):
    """W_eff x, where only the values at `index_OK` have a gradient: dv[o, k] = sum_t g[t, o] * x[t, index[o, k]]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, values_OK: torch.Tensor, weight: torch.Tensor, index_OK: torch.Tensor, layer: TunableLayer
    ) -> torch.Tensor:  # type: ignore[override]
        ctx.layer = layer
        ctx.values_dtype = values_OK.dtype
        ctx.save_for_backward(x, weight, index_OK)
        return apply_layer(layer, x, weight, None)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:  # type: ignore[override]
        x, weight, index_OK = ctx.saved_tensors
        x_gradient = _input_gradient(ctx.layer, x, weight, gradient) if ctx.needs_input_grad[0] else None
        values_gradient = dense_weight_gradient(ctx.layer, x, gradient).gather(1, index_OK).to(ctx.values_dtype)
        return x_gradient, values_gradient, None, None, None


class TunedLayer(nn.Module):
    """A frozen Linear or Conv2d with trained connections, a trained bias, or both.

    Args:
        base: the backbone's layer; never written to.
        index_OK: selected columns of each row, or None to leave the weight alone.
    """

    def __init__(
        self, base: TunableLayer, index_OK: torch.Tensor | None, connection_bits: Bits, bias_bits: Bits | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base = base
        self.index_OK = None if index_OK is None else index_OK.long()
        self.connections = None if index_OK is None else small_change(tuple(index_OK.shape), connection_bits, generator)
        self.bias = small_change(tuple(base.bias.shape), bias_bits, generator) if bias_bits is not None and base.bias is not None else None

    def weight_with(self, values_OK: torch.Tensor) -> torch.Tensor:
        """The effective weight, shaped as the base layer's: every entry but the selected ones is the backbone's, bit for bit."""
        flat_OI = self.base.weight.detach().reshape(self.base.weight.shape[0], -1)
        assert self.index_OK is not None
        changed_OK = flat_OI.gather(1, self.index_OK) + values_OK.detach()
        return flat_OI.scatter(1, self.index_OK, changed_OK).reshape(self.base.weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.base.bias if self.bias is None else self.base.bias + self.bias()
        if self.connections is None:
            return apply_layer(self.base, x, self.base.weight, bias)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        values_OK = self.connections()
        weight = self.weight_with(values_OK).to(dtype)
        y = _ConnectedProduct.apply(x.to(dtype), values_OK, weight, self.index_OK, self.base)
        if bias is None:
            return y
        bias = bias.to(dtype)
        return y + (bias if isinstance(self.base, nn.Linear) else bias[:, None, None])
