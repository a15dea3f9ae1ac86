"""A layer that the samples of many packs pass in one batch, each with its own pack's connections
and bias.

Legend: B samples, R rows of a sample, I inputs and O outputs of the layer, K connections per
neuron, P packs, N connections of a pack in the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.adaptation.part import PARTS, SharedNetwork
from pipeline.adaptation.sites import TunableLayer, apply_layer
from pipeline.adaptation.wrapper import Wrapper
from pipeline.utils.devices import dtype_of_products

if TYPE_CHECKING:
    from pipeline.adaptation.flat import FlatPart
    from pipeline.adaptation.lanes import Lane, MixedBatch

ROWS_PER_PRODUCT = 100
"""Rows per pack of a mixed batch, times K, from which on a product for each pack is faster than
adding K inputs per output of all rows, as measured on a CPU.
"""
ROWS_AT_ONCE = 4096
"""Rows whose outputs stay in the cache of a CPU from the selected inputs to the product."""


class MixedLayer(Wrapper):
    """A layer in which the samples of each pack pass the weight with its connections, and get its
    bias.

    Samples of few packs: the connections of each pack are written into the one weight in memory for
    the product of its samples, and what they overwrote is then written back, bit for bit.

    Samples of many packs: the product with the backbone's weight is added to the selected inputs
    times their pack's values, K per output. A convolution whose windows do not overlap, such as
    that of a patch embedding, is a linear layer of its windows.
    """

    base: TunableLayer

    def __init__(self, base: TunableLayer, name: str, network: SharedNetwork) -> None:
        super().__init__(base)
        self.name, self.network = name, network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, layer = self.network.batch, self.base
        lanes = self.network.lanes(PARTS["connections"])
        if batch is None or not any(lane.has(self.name) for lane in lanes):
            return self._with_biases(apply_layer(layer, x, layer.weight, layer.bias))
        x = x.to(dtype_of_products(x))
        rows = _rows(layer, x)
        if rows is None or not self._are_many(lanes, rows.shape[:-1].numel()):
            return self._with_biases(self._product_per_pack(x, batch))
        x_BRI = rows.reshape(len(batch.owners), -1, rows.shape[-1])
        y = self._corrected(x_BRI, lanes).view(*rows.shape[:-1], -1)
        if isinstance(layer, nn.Linear):
            return y
        return y.mT.unflatten(2, (x.shape[2] // layer.kernel_size[0], -1))

    def _with_biases(self, y: torch.Tensor) -> torch.Tensor:
        """Add the changes of each sample's bias to an output that nothing else reads, in place."""
        dim = -1 if isinstance(self.base, nn.Linear) else -3
        for lane in self._lanes_of_biases():
            y = lane.change(y, functools.partial(lane.add, self.name, dim))
        return y

    def _lanes_of_biases(self) -> list[Lane]:
        return [lane for lane in self.network.lanes(PARTS["biases"]) if lane.has(self.name)]

    def _are_many(self, lanes: Sequence[Lane], rows: int) -> bool:
        """Whether rows change packs so often that reading K inputs per output is faster than a
        product and a change of weights per pack.
        """
        top_k, packs = max(lane.spec.top_k for lane in lanes), sum(lane.packs for lane in lanes)
        return rows * top_k < ROWS_PER_PRODUCT * packs and all(lane.is_per_neuron for lane in lanes)

    def _corrected(self, x_BRI: torch.Tensor, lanes: Sequence[Lane]) -> torch.Tensor:
        """The product, [B, R, O], with what the connections of each sample's pack add, and with
        its bias.
        """
        weight_OI = self.base.weight.flatten(1).to(x_BRI.dtype)
        samples, rows, _ = x_BRI.shape
        bias_BO = self._biases(samples).to(x_BRI.dtype)
        columns_BOK, values_BOK = self._connections(lanes, samples)
        values_BOK = values_BOK.to(x_BRI.dtype)
        y_BRO = x_BRI.new_empty(samples, rows, len(weight_OI))
        pieces = -(-samples * rows // ROWS_AT_ONCE) if x_BRI.device.type == "cpu" else 1
        at_once = -(-samples // pieces)
        of_batch = x_BRI, y_BRO, bias_BO, columns_BOK, values_BOK
        for x, y, bias, columns, values in zip(
            *(each.split(at_once) for each in of_batch), strict=True
        ):
            first, *others = columns.unbind(2)
            torch.gather(x, 2, first[:, None].expand(y.shape), out=y)
            torch.addcmul(bias[:, None], y, values[:, None, :, 0], out=y)
            for k, each in enumerate(others, start=1):
                y.addcmul_(x.gather(2, each[:, None].expand(y.shape)), values[:, None, :, k])
            y.flatten(0, 1).addmm_(x.flatten(0, 1), weight_OI.T)
        return y_BRO

    def _biases(self, samples: int) -> torch.Tensor:
        """The bias of each sample, [B, O]: zeros where the layer has none."""
        bias_O = self.base.bias
        if bias_O is None:
            bias_O = self.base.weight.new_zeros(len(self.base.weight))
        bias_BO = bias_O.expand(samples, -1)
        for lane in self._lanes_of_biases():
            bias_BO = lane.change(bias_BO, lane.values(self.name).add)
        return bias_BO

    def _connections(self, lanes: Sequence[Lane], samples: int) -> tuple[torch.Tensor, ...]:
        """The columns, int64, and the values of each sample's connections, [B, O, K]: of the
        largest K of the batch, where connections that a pack lacks have a value of 0.
        """
        weight_OI = self.base.weight.flatten(1)
        outputs = len(weight_OI)
        connected = [lane for lane in lanes if lane.has(self.name)]
        found = [
            tuple(each.unflatten(1, (outputs, -1)) for each in lane.connections(self.name))
            for lane in connected
        ]
        if len(connected) == 1 and connected[0].is_whole:
            return found[0]
        shape = (samples, outputs, max(lane.spec.top_k for lane in lanes))
        columns_BOK = torch.zeros(shape, dtype=torch.long, device=weight_OI.device)
        values_BOK = weight_OI.new_zeros(shape)
        for lane, (columns_SOK, values_SOK) in zip(connected, found, strict=True):
            columns_BOK = lane.change(columns_BOK, functools.partial(_padded, columns_SOK))
            values_BOK = lane.change(values_BOK, functools.partial(_padded, values_SOK))
        return columns_BOK, values_BOK

    def _product_per_pack(self, x: torch.Tensor, batch: MixedBatch) -> torch.Tensor:
        layer, parts = self.base, [part for part, _ in batch.runs("connections")]
        rows = len(x) // len(batch.owners)
        counts = [samples * rows for _, samples in batch.runs("connections")]
        weight = layer.weight.to(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        if not isinstance(layer, nn.Linear):
            with closing(self._written(weight, parts, x.split(counts), batch)) as each:
                changed = [apply_layer(layer, some, weight, bias) for some in each]
            return torch.cat(changed)
        y = x.new_empty(*x.shape[:-1], layer.out_features)
        inputs, outputs = x.flatten(0, -2), y.flatten(0, -2)
        counts = [count * (len(inputs) // len(x)) for count in counts]
        into = iter(outputs.split(counts))  # a copy of each product takes a tenth as long
        with closing(self._written(weight, parts, inputs.split(counts), batch)) as each:
            for some in each:
                if bias is None:
                    torch.mm(some, weight.T, out=next(into))
                else:
                    torch.addmm(bias, some, weight.T, out=next(into))
        return y

    def _written(
        self,
        weight: torch.Tensor,
        parts: Sequence[FlatPart | None],
        inputs: Iterable[torch.Tensor],
        batch: MixedBatch,
    ) -> Generator[torch.Tensor]:
        """Each of the inputs, while `weight`, which is the layer's or a rounded copy, has the
        connections of its part, if any.
        """
        exact, entries = self.base.weight.view(-1), weight.view(-1)
        layer = len(weight), weight[0].numel()
        writes: dict[int, tuple[torch.Tensor, ...]] = {}
        for lane in batch.lanes("connections"):
            if lane.has(self.name):
                index_PN, values_PN = lane.per_pack(self.name, layer)
                frozen_PN = exact[index_PN]
                changed_PN = (frozen_PN + values_PN).to(weight.dtype)
                each = zip(index_PN, changed_PN, frozen_PN.to(weight.dtype), strict=True)
                writes.update(zip(map(id, lane.parts), each, strict=True))
        for part, some in zip(parts, inputs, strict=True):
            if (write := writes.get(id(part))) is None:
                yield some
                continue
            index_N, changed_N, frozen_N = write
            try:
                entries.index_copy_(0, index_N, changed_N)
                yield some
            finally:
                entries.index_copy_(0, index_N, frozen_N)


def _padded(of_lane_SOK: torch.Tensor, of_batch_SOK: torch.Tensor) -> torch.Tensor:
    """A lane's connections as those of the batch, in which neurons may have more of them."""
    return F.pad(of_lane_SOK, (0, of_batch_SOK.shape[2] - of_lane_SOK.shape[2]))


def _rows(layer: TunableLayer, x: torch.Tensor) -> torch.Tensor | None:
    """What the neurons of a layer read, [..., I]: of a convolution, its windows [B, R, I]; None if
    they overlap or are padded.
    """
    if isinstance(layer, nn.Linear):
        return x
    sizes, unpadded, dense = layer.kernel_size, (0, 0), (1, 1)
    if (layer.stride, layer.padding, layer.dilation, layer.groups) != (sizes, unpadded, dense, 1):
        return None
    (high, wide), (height, width) = sizes, x.shape[2:]
    whole = x[:, :, : height // high * high, : width // wide * wide]
    windows = whole.unflatten(3, (-1, wide)).unflatten(2, (-1, high))
    return windows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
