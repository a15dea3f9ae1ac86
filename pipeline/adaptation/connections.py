"""Connections: a layer's frozen weight with a few selected entries that train (GPS, arXiv 2312.10136), and its bias.

    y = (W + V) x + b        V is zero but for v[o, k] at column index[o, k]
    dv[o, k] = sum_t g[t, o] * x[t, index[o, k]]

The forward pass is the plain dense layer on a weight with the changed entries written in. The backward pass hands gradients to the short vector of
values only. A layer's neurons choose among few columns (some 30 of 192 in a pretrained ViT at K = 1), so the gradient is one small matrix product
over the columns chosen by any neuron, of which every neuron picks its own; and only those columns of the input are kept for it. Where most columns
are chosen, the dense product is made and dropped at once. Linear and Conv2d share the code: a convolution's weight is seen as [out, in * kh * kw].
Shapes: O outputs (neurons), I inputs of a neuron, K kept connections, U distinct columns chosen in a layer, T tokens or pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import grad as nn_grad

TunableLayer = nn.Linear | nn.Conv2d
FEW_COLUMNS = 0.5
"""Share of a layer's columns up to which gathering them first is faster than the dense product, measured on CPU."""


def apply_layer(layer: TunableLayer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The plain dense layer on another weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def dense_weight_gradient(layer: TunableLayer, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of the layer's weight as [O, I], from its input and its output's gradient."""
    if isinstance(layer, nn.Linear):
        return gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    weight_gradient = nn_grad.conv2d_weight(x, list(layer.weight.shape), gradient, layer.stride, layer.padding, layer.dilation, layer.groups)
    return weight_gradient.reshape(layer.weight.shape[0], -1)


def _input_gradient(layer: TunableLayer, x_shape: torch.Size, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return gradient @ weight
    return nn_grad.conv2d_input(list(x_shape), weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups)


def _as_tokens(layer: TunableLayer, x: torch.Tensor) -> torch.Tensor | None:
    """The layer's input as [T, I], one row an output position, where that is a view or a permutation of it: Linear, and Conv2d on patches."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    kernel, images, channels = layer.kernel_size, x.shape[0], x.shape[1]
    on_patches = kernel == layer.stride and layer.groups == 1 and layer.padding == (0, 0) and layer.dilation == (1, 1)
    if not on_patches or x.shape[2] % kernel[0] or x.shape[3] % kernel[1]:
        return None
    patches = x.reshape(images, channels, x.shape[2] // kernel[0], kernel[0], x.shape[3] // kernel[1], kernel[1])
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * kernel[0] * kernel[1])


def _outputs_as_tokens(layer: TunableLayer, y: torch.Tensor) -> torch.Tensor:
    """[T, O] in the order of `_as_tokens`."""
    return y.reshape(-1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.movedim(1, -1).reshape(-1, y.shape[1])


class _ConnectedProduct(torch.autograd.Function):
    """W_eff x + b for a weight whose only gradient is that of the values at `index_OK`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, values_OK: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, tuned: TunedLayer
    ) -> torch.Tensor:
        ctx.tuned, ctx.x_shape, ctx.values_dtype, ctx.bias_dtype = tuned, x.shape, values_OK.dtype, None if bias is None else bias.dtype
        # The weight is written in place at the next step only, after this backward pass; saved as an attribute, it needs no version check.
        ctx.weight = weight
        tokens_TI = _as_tokens(tuned.base, x) if tuned.has_few_columns else None
        ctx.keeps_columns = tokens_TI is not None
        ctx.save_for_backward(x if tokens_TI is None else tokens_TI[:, tuned.columns_U])
        return apply_layer(tuned.base, x, weight, None if bias is None else bias.to(weight.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, None, None]:  # type: ignore[override]
        tuned, (kept,) = ctx.tuned, ctx.saved_tensors
        x_gradient = _input_gradient(tuned.base, ctx.x_shape, ctx.weight, gradient) if ctx.needs_input_grad[0] else None
        gradient_TO = _outputs_as_tokens(tuned.base, gradient)
        if ctx.keeps_columns:
            values_gradient = (gradient_TO.T @ kept).gather(1, tuned.column_of_OK)
        else:
            values_gradient = dense_weight_gradient(tuned.base, kept, gradient).gather(1, tuned.index_OK)
        bias_gradient = gradient_TO.sum(dim=0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return x_gradient, values_gradient.to(ctx.values_dtype), bias_gradient, None, None


class TunedLayer(nn.Module):
    """A frozen Linear or Conv2d with trained connections, a trained bias, or both.

    `current` holds what this forward pass uses: `connections` [O, K] is added to the weight's entries at `index_OK`, `bias` [O] to the bias.

    Args:
        base: the backbone's layer; never written to.
        index_OK: selected columns of each row, or None to leave the weight alone.
    """

    index_OK: torch.Tensor | None
    columns_U: torch.Tensor
    column_of_OK: torch.Tensor

    def __init__(self, base: TunableLayer, index_OK: torch.Tensor | None) -> None:
        super().__init__()
        self.base = base
        self.current: dict[str, torch.Tensor] = {}
        self.register_buffer("index_OK", None if index_OK is None else index_OK.long(), persistent=False)
        self.has_few_columns = False
        self._written: torch.Tensor | None = None
        if self.index_OK is not None:
            columns_U, column_of_OK = self.index_OK.unique(return_inverse=True)
            self.has_few_columns = len(columns_U) <= FEW_COLUMNS * base.weight[0].numel()
            self.register_buffer("columns_U", columns_U, persistent=False)
            self.register_buffer("column_of_OK", column_of_OK, persistent=False)

    def _flat_weight_OI(self) -> torch.Tensor:
        return self.base.weight.detach().reshape(self.base.weight.shape[0], -1)

    @property
    def weight(self) -> torch.Tensor:
        """The effective weight with its gradient, for blocks that use a layer's weight themselves (SwinV2, BEiT)."""
        if self.index_OK is None:
            return self.base.weight
        flat_OI = self.base.weight.reshape(self.base.weight.shape[0], -1)
        return flat_OI.scatter_add(1, self.index_OK, self.current["connections"]).reshape(self.base.weight.shape)

    def weight_with(self, values_OK: torch.Tensor) -> torch.Tensor:
        """The effective weight, shaped as the base layer's: every entry but the selected ones is the backbone's, bit for bit."""
        assert self.index_OK is not None
        flat_OI = self._flat_weight_OI()
        changed_OK = flat_OI.gather(1, self.index_OK) + values_OK.detach()
        return flat_OI.scatter(1, self.index_OK, changed_OK).reshape(self.base.weight.shape)

    def _write(self, values_OK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The effective weight in `dtype`, written into a copy that is made once and kept while training."""
        assert self.index_OK is not None
        flat_OI = self._flat_weight_OI()
        if self._written is None or self._written.dtype != dtype or self._written.device != flat_OI.device:
            self._written = flat_OI.to(dtype, copy=True)
        changed_OK = flat_OI.gather(1, self.index_OK) + values_OK.detach()
        self._written.scatter_(1, self.index_OK, changed_OK.to(dtype))
        return self._written.view(self.base.weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.base.bias
        if bias is not None and "bias" in self.current:
            bias = bias + self.current["bias"]
        if self.index_OK is None:
            return apply_layer(self.base, x, self.base.weight, bias)
        values_OK = self.current["connections"]
        if not torch.is_grad_enabled():
            return apply_layer(self.base, x, self.weight_with(values_OK), bias)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return _ConnectedProduct.apply(x.to(dtype), values_OK, bias, self._write(values_OK, dtype), self)
