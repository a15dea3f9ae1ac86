"""Gradients of the connections of all layers, picked from the layers' products by one operation.

A layer's backward pass computes a product of which the gradients of its connections are a few
entries. Picking them layer by layer would launch a kernel for each. So each layer is given a
stand-in for its product, a tensor of the same shape that takes no memory. The gradient of the
stand-in is the product; once all layers have computed theirs, their entries are picked together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipeline.adaptation.parts.connections import TunedLayer


class Products(nn.Module):
    """Splits flat values into pieces, some of which are the connections of layers.

    Args:
        sizes: of all pieces.
        layers: those whose product's shape is known, by the numbers of their pieces.
    """

    index_M: torch.Tensor

    def __init__(self, sizes: Sequence[int], layers: dict[int, TunedLayer]) -> None:
        super().__init__()
        self.sizes, self.numbers = list(sizes), list(layers)
        self._layers = list(layers.values())  # not registered: they belong to the network
        self.shapes = [layer.product_shape for layer in self._layers]
        starts = itertools.accumulate((rows * columns for rows, columns in self.shapes), initial=0)
        index = [
            layer.product_index + start for layer, start in zip(self._layers, starts, strict=False)
        ]
        self.register_buffer("index_M", torch.cat(index), persistent=False)

    def forward(self, values_N: torch.Tensor) -> Sequence[torch.Tensor]:
        """The pieces. The layers get the stand-ins for their products."""
        outputs: tuple[torch.Tensor, ...] = _Split.apply(values_N, self)
        pieces = len(self.sizes)
        for layer, stand_in in zip(self._layers, outputs[pieces:], strict=True):
            layer.product = stand_in
        return outputs[:pieces]

    def picked(self, products: Sequence[torch.Tensor | None]) -> list[torch.Tensor] | None:
        """The connections' gradients of each layer; None where no layer has left its product."""
        known = next((product for product in products if product is not None), None)
        if known is None:
            return None
        flat = torch.cat(
            [
                (known.new_zeros(shape) if product is None else product).flatten()
                for product, shape in zip(products, self.shapes, strict=True)
            ]
        )
        sizes = [self.sizes[number] for number in self.numbers]
        return list(flat.take(self.index_M).split(sizes))


class _Split(torch.autograd.Function):
    """Pieces of flat values, and stand-ins for products, whose gradients are the products."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, values_N: torch.Tensor, products: Products
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.products = products
        stand_in = values_N.new_empty(())
        return *values_N.split(products.sizes), *map(stand_in.expand, products.shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:  # type: ignore[override]
        sizes, numbers = ctx.products.sizes, ctx.products.numbers
        pieces = list(gradients[: len(sizes)])
        picked = ctx.products.picked(gradients[len(sizes) :])
        for number, gradient in zip(numbers, picked or (), strict=picked is not None):
            other = pieces[number]
            pieces[number] = gradient if other is None else other + gradient
        known = next((piece for piece in pieces if piece is not None), None)
        if known is None:
            return None, None
        filled = [
            known.new_zeros(size) if piece is None else piece
            for piece, size in zip(pieces, sizes, strict=True)
        ]
        return torch.cat(filled), None
