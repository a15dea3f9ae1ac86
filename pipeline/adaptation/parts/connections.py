"""Connections: a layer's frozen weight with a few selected entries that train (GPS, arXiv
2312.10136), and its bias.

    y = (W + V) x + b        V is zero but for v[n] at row o[n] and column i[n]
    dv[n] = sum_t g[t, o[n]] * x[t, i[n]]

The forward pass is the plain dense layer on a weight with the changed entries written in. The
backward pass computes gradients of the short vector of values only. A layer's neurons select few
distinct columns (some 30 of 192 in a pretrained ViT at K = 1): only those columns of the input are
kept, and the gradient is a few entries of their product with the output's gradient (sampled.py). If
most columns are selected, the dense product is computed and indexed. Linear and Conv2d share the
code: a convolution's weight is seen as [out, in * kh * kw]. Shapes: O outputs (neurons), I inputs
of a neuron, K kept connections of a neuron, N kept connections of a layer, U distinct columns
chosen in a layer, T tokens or pixels. A flat index is a number o * I + i: an entry of the weight
seen as one row-major [O, I] matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import grad as nn_grad

from pipeline.adaptation.mixed_layer import MixedLayer
from pipeline.adaptation.part import (
    Assembly,
    Mixing,
    Part,
    SharedNetwork,
    Site,
    Stage,
    WeightChange,
    register,
)
from pipeline.adaptation.selected.ranking import kept_at, kept_indices
from pipeline.adaptation.sites import (
    TunableLayer,
    apply_layer,
    tunable_layers,
    weight_reader,
)
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.adaptation.wrapper import Wrapper
from pipeline.specs import Connections
from pipeline.utils.devices import dtype_of_products

FEW_COLUMNS = 0.5
"""Fraction of a layer's columns up to which gathering them is faster than the dense product, as
measured on a CPU. The product over the gathered columns is then indexed. A kernel that fuses the
two saved 1 % of a step on a CPU, and took 4 to 11 times as long on an H200.
"""


def dense_weight_gradient(
    layer: TunableLayer, x: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """Gradient of the layer's weight as [O, I], from its input and its output's gradient."""
    if isinstance(layer, nn.Linear):
        return gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    weight_gradient = nn_grad.conv2d_weight(
        x,
        list(layer.weight.shape),
        gradient,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
    return weight_gradient.reshape(layer.weight.shape[0], -1)


def _input_gradient(
    layer: TunableLayer, x_shape: torch.Size, weight: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return gradient @ weight
    return nn_grad.conv2d_input(
        list(x_shape), weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def _as_tokens(layer: TunableLayer, x: torch.Tensor) -> torch.Tensor | None:
    """The layer's input as [T, I], one row per output position, if that is a view or a
    permutation of it: Linear, and Conv2d on patches.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    kernel, images, channels = layer.kernel_size, x.shape[0], x.shape[1]
    on_patches = (
        kernel == layer.stride
        and layer.groups == 1
        and layer.padding == (0, 0)
        and layer.dilation == (1, 1)
    )
    if not on_patches or x.shape[2] % kernel[0] or x.shape[3] % kernel[1]:
        return None
    patches = x.reshape(
        images, channels, x.shape[2] // kernel[0], kernel[0], x.shape[3] // kernel[1], kernel[1]
    )
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * kernel[0] * kernel[1])


def _outputs_as_tokens(layer: TunableLayer, y: torch.Tensor) -> torch.Tensor:
    """[T, O] in the order of `_as_tokens`."""
    return (
        y.reshape(-1, y.shape[-1])
        if isinstance(layer, nn.Linear)
        else y.movedim(1, -1).reshape(-1, y.shape[1])
    )


def _chosen_and_one(tokens_TI: torch.Tensor, columns_U: torch.Tensor) -> torch.Tensor:
    """The chosen columns, the last replaced by ones."""
    kept_TU = tokens_TI.index_select(1, columns_U)
    kept_TU[:, -1] = 1
    return kept_TU


class _ConnectedProduct(torch.autograd.Function):
    """W_eff x + b for a weight whose only gradient is that of the values at `index_N`.

    `values` are these values [N] or a stand-in for the product of which their gradients are
    entries: its gradient is the product.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        weight: torch.Tensor,
        tuned: TunedLayer,
    ) -> torch.Tensor:
        ctx.tuned, ctx.x_shape, ctx.values_dtype, ctx.bias_dtype = (
            tuned,
            x.shape,
            values.dtype,
            None if bias is None else bias.dtype,
        )
        ctx.is_picked_later = values.ndim > 1
        # The weight is written in place at the next step only, after this backward pass; saved as
        # an attribute, it needs no version check.
        ctx.weight = weight
        tokens_TI = _as_tokens(tuned.base, x) if tuned.has_few_columns else None
        ctx.keeps_columns = tokens_TI is not None
        ctx.save_for_backward(
            x if tokens_TI is None else _chosen_and_one(tokens_TI, tuned.columns_U)
        )
        return apply_layer(tuned.base, x, weight, None if bias is None else bias.to(weight.dtype))

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, None, None]:  # type: ignore[override]
        tuned, (kept,) = ctx.tuned, ctx.saved_tensors
        x_gradient = (
            _input_gradient(tuned.base, ctx.x_shape, ctx.weight, gradient)
            if ctx.needs_input_grad[0]
            else None
        )
        gradient_TO = _outputs_as_tokens(tuned.base, gradient)
        if ctx.keeps_columns:
            product, index = kept.T @ gradient_TO, tuned.product_index
            bias_gradient = product[-1]
        else:
            product, index = dense_weight_gradient(tuned.base, kept, gradient), tuned.index_N
            bias_gradient = gradient_TO.sum(dim=0)
        values_gradient = product if ctx.is_picked_later else product.take(index)
        return (
            x_gradient,
            values_gradient.to(ctx.values_dtype),
            bias_gradient.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


class TunedLayer(Wrapper, WeightChange):
    """A frozen Linear or Conv2d with trained connections, a trained bias, or both.

    `current` holds what this forward pass uses: `connections` [N] are the weight's entries at the
    indices `index_N`, `bias` [O] is the bias. `written` is a copy of the weight with these entries
    in it, kept by `WrittenWeights`, and `product` a stand-in for that of the backward pass, made by
    `Products`; a layer by itself has neither.

    Args:
        base: the backbone's layer; never written to.
        index_N: indices of the selected entries, ascending, or None to leave the weight alone.
    """

    base: TunableLayer
    is_rounded = True
    index_N: torch.Tensor | None
    columns_U: torch.Tensor
    product_index: torch.Tensor

    def __init__(self, base: TunableLayer, index_N: torch.Tensor | None) -> None:
        super().__init__(base)
        self.current: dict[str, torch.Tensor] = {}
        self.register_buffer("index_N", index_N, persistent=False)
        self.has_few_columns = False
        self.written: torch.Tensor | None = None
        self.product: torch.Tensor | None = None
        self._merged: tuple[torch.Tensor, torch.Tensor | None] | None = None
        if index_N is not None:
            columns = base.weight[0].numel()
            columns_U, column_of_N = (index_N % columns).unique(return_inverse=True)
            self.has_few_columns = len(columns_U) <= FEW_COLUMNS * columns
            # One more column of ones makes the bias gradient part of the same product: its sums are
            # the last row.
            self.register_buffer(
                "columns_U", torch.cat([columns_U, columns_U[-1:]]), persistent=False
            )
            self.register_buffer(
                "product_index",
                column_of_N * base.weight.shape[0] + index_N // columns,
                persistent=False,
            )

    @property
    def product_shape(self) -> tuple[int, int]:
        """That of the product of the chosen columns and of ones with the output's gradient, [U + 1,
        O]; the gradients of the connections are its entries at `product_index`.
        """
        return len(self.columns_U), self.base.weight.shape[0]

    @property
    def always_keeps_columns(self) -> bool:
        """Whether the backward pass computes that product for inputs of any size."""
        return self.has_few_columns and isinstance(self.base, nn.Linear)

    @property
    def weight(self) -> torch.Tensor:
        """The effective weight with its gradient, for blocks that use a layer's weight themselves
        (SwinV2, BEiT).
        """
        if self.index_N is None:
            return self.base.weight
        return (
            self.base.weight.flatten()
            .scatter(0, self.index_N, self.current["connections"].to(self.base.weight.dtype))
            .view(self.base.weight.shape)
        )

    def weight_with(self, values_N: torch.Tensor) -> torch.Tensor:
        """The effective weight, shaped as the base layer's: every entry but the selected ones is
        the backbone's, bit for bit.
        """
        assert self.index_N is not None
        return (
            self.base.weight.detach()
            .flatten()
            .scatter(0, self.index_N, values_N.detach().to(self.base.weight.dtype))
            .view(self.base.weight.shape)
        )

    def frozen(self, key: str) -> torch.Tensor | None:
        """The selected entries, or the bias."""
        if key == "connections":
            assert self.index_N is not None
            return self.base.weight.detach().take(self.index_N)
        return None if key != "bias" or self.base.bias is None else self.base.bias.detach()

    def own_parameters(self) -> list[nn.Parameter]:
        """The base layer's parameters that trained changes are added to."""
        return [
            parameter
            for name, parameter in self.base.named_parameters()
            if name == "bias" or self.index_N is not None
        ]

    def merge(self, is_merged: bool) -> None:
        """Merge the current values into weight and bias, so that a forward pass is the plain
        layer's, or undo that.
        """
        self._merged = (
            (
                self.base.weight
                if self.index_N is None
                else self.weight_with(self.current["connections"]),
                self.bias,
            )
            if is_merged
            else None
        )

    @property
    def bias(self) -> torch.Tensor | None:
        """The effective bias with its gradient."""
        return self.current.get("bias", self.base.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._merged is not None:
            return apply_layer(self.base, x, *self._merged)
        if self.index_N is None:
            return apply_layer(self.base, x, self.base.weight, self.bias)
        values_N = self.current["connections"]
        if not torch.is_grad_enabled():
            return apply_layer(self.base, x, self.weight_with(values_N), self.bias)
        dtype = dtype_of_products(x)
        weight = self.weight_with(values_N).to(dtype) if self.written is None else self.written
        values = values_N if self.product is None else self.product
        return _ConnectedProduct.apply(x.to(dtype), values, self.bias, weight, self)

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """The effective weight and bias."""
        bias = self.bias
        return {"weight": self.weight} if bias is None else {"weight": self.weight, "bias": bias}


def tune_layers(assembly: Assembly, indices: Mapping[str, torch.Tensor]) -> None:
    """Replace every layer that may change by a `TunedLayer`, with connections where `indices` [N]
    has some.
    """
    for name in assembly.site.layers:
        layer = assembly.model.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        tuned = assembly.modules[f"layer:{name}"] = TunedLayer(layer, indices.get(name))
        assembly.model.set_submodule(name, tuned)


@register
class ConnectionsPart(Part):
    """Selected entries of every layer's weight."""

    name, pack_order, stage = "connections", 1, Stage.WEIGHTS
    needs = "it needs Linear or Conv2d layers"

    def plan(self, spec: Connections, site: Site) -> list[PlannedTensor]:
        """A vector per layer: as many values as the selection keeps or, without one, K per
        neuron.
        """
        shapes = {name: site.weight_shapes[name] for name in site.layers}
        counts = {name: kept_at(shape, spec.top_k) for name, shape in shapes.items()}
        if site.selected is not None:
            kept = {name: ranked.count(spec.top_k) for name, ranked in site.selected.items()}
            counts = {name: count for name, count in kept.items() if count}
        return [
            PlannedTensor("connections", name, (counts[name],), spec.bits, shape)
            for name, shape in shapes.items()
            if name in counts
        ]

    def attach(self, spec: Connections, assembly: Assembly) -> None:
        """Replace every layer, and with it its bias."""
        selected = assembly.site.selected
        assert selected is not None, "a recipe with connections needs a selection"
        tune_layers(assembly, kept_indices(selected, spec.top_k))

    def mix(self, network: SharedNetwork) -> Mixing:
        """Replace every layer, where all are called as layers."""
        if weight_reader(network.model) is not None:
            return Mixing.APART
        for name, layer in tunable_layers(network.model).items():
            network.model.set_submodule(name, MixedLayer(layer, name, network))
        return Mixing.FREELY

    def address(self, tensor: PlannedTensor, modules: Mapping[str, Any]) -> tuple[str, str]:
        """The layer of the tensor's name."""
        return f"layer:{tensor.name}", "connections"
