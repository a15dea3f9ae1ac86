"""DTL: a low-rank side network along the blocks (arXiv 2312.07856).

    h_i = h_(i-1) + up_i down_i x_i        x_i: what block i reads; down is [R, D], up [D, R]
    y_i = block_i(x_i) + scale * swish(h_i)        for the blocks from `feed_from` on
    swish(h) = h * sigmoid(beta * h)

The blocks before `feed_from` are only read, so nothing is differentiated through them. Where the
shape of the stream changes from one block to the next (the stages of Swin), the sum starts again,
as in the released code; stages without a block that gets the sum are left out.
Shapes: D width, R rank, S samples of a lane, N rows of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.adaptation.blocks import MlpSlot, mlp_slots
from pipeline.adaptation.part import (
    MLP_BLOCKS,
    Assembly,
    Mixing,
    Part,
    SharedNetwork,
    Site,
    Stage,
    register,
)
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.adaptation.watched import first_tensor, learnt_once, watch
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError
from pipeline.specs import Dtl

if TYPE_CHECKING:
    from pipeline.adaptation.lanes import Lane


@dataclass(frozen=True)
class SideBlock:
    """A block that returns the stream in the shape in which it reads it. Such blocks are numbered
    in the order of their calls; neighbours of one shape are of the same `stage`.
    """

    name: str
    number: int
    stage: int
    width: int
    channels_first: bool


@learnt_once
def side_blocks(backbone: LoadedBackbone) -> Sequence[SideBlock]:
    """The blocks with an MLP that can be read and added to."""
    slots = {slot.block: slot for slot in mlp_slots(backbone)}
    calls: list[tuple[str, torch.Size]] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        read = first_tensor(inputs)
        if isinstance(output, torch.Tensor) and read is not None and read.shape == output.shape:
            calls.append((name, output.shape))

    def place_hooks(model: nn.Module) -> None:
        for name in slots:
            model.get_submodule(name).register_forward_hook(partial(note, name))

    watch(backbone, place_hooks)
    names = [name for name, _ in calls]
    found: list[SideBlock] = []
    stage, previous = -1, None
    for name, shape in calls:
        slot = slots[name]
        is_known = slot.mlp is not None and shape[_channels_at(slot)] == slot.width
        if not is_known or names.count(name) > 1:
            continue
        if shape != previous:
            stage, previous = stage + 1, shape
        found.append(SideBlock(name, len(found), stage, slot.width, _channels_at(slot) == 1))
    return found


def _channels_at(slot: MlpSlot) -> int:
    return 1 if slot.mlp is not None and slot.mlp.channels_first else -1


def _first_fed(spec: Dtl, backbone: LoadedBackbone) -> int:
    """The number of the first block whose output the sum is added to. Raises BackboneError."""
    count = len(side_blocks(backbone))
    if spec.feed_from is None:
        return count // 2
    if count and spec.feed_from >= count:
        raise BackboneError(
            f"recipe.dtl.feed_from: given {spec.feed_from}, but {type(backbone.model).__name__} has"
            f" {count} blocks that it can be added to; expected at most {count - 1}"
        )
    return spec.feed_from


def _sites(spec: Dtl, site: Site) -> list[SideBlock]:
    """The blocks that are read, in the order of their calls. Raises BackboneError."""
    free, first = {slot.block for slot in site.slots}, _first_fed(spec, site.backbone)
    blocks = [block for block in side_blocks(site.backbone) if block.name in free]
    fed = {block.stage for block in blocks if block.number >= first}
    return [block for block in blocks if block.stage in fed]


class SideSums:
    """The sums of the pass under way, by stage, in the type of the stream. The first block of a
    stage starts a sum, and the last one takes it out.
    """

    def __init__(self, blocks: Sequence[SideBlock]) -> None:
        self._first = {block.stage: block for block in reversed(blocks)}
        self._last = {block.stage: block for block in blocks}
        self._sums: dict[int, torch.Tensor] = {}

    def read(self, block: SideBlock, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> None:
        """Add what a block's maps `down` [S, R, D] and `up` [S, D, R] make of its input; S is 1
        where all samples have the same.
        """
        x = x.movedim(1, -1) if block.channels_first else x
        rows_SND = x.reshape(len(down), -1, block.width)
        read = (rows_SND @ down.mT @ up.mT).view(x.shape).to(x.dtype)
        is_first = block == self._first[block.stage]
        self._sums[block.stage] = read if is_first else self._sums[block.stage] + read

    def feed(self, block: SideBlock, spec: Dtl, y: torch.Tensor) -> torch.Tensor:
        """A block's output with the sum."""
        total = self._sums[block.stage]
        if block == self._last[block.stage]:
            del self._sums[block.stage]
        added = F.silu(spec.beta * total) * (spec.scale / spec.beta)
        return y + (added.movedim(-1, 1) if block.channels_first else added)

    def end_pass(self, *_: object) -> None:
        """Forget the sums of a pass that ended, or failed half-way: a hook of the network."""
        self._sums.clear()


class SideMap(nn.Module):
    """The map of one block. `current` holds this forward pass's `down` [R, D] and `up` [D, R]."""

    def __init__(self, block: SideBlock, spec: Dtl, sums: SideSums) -> None:
        super().__init__()
        self.block, self.spec, self.sums = block, spec, sums
        self.current: dict[str, torch.Tensor] = {}

    def read(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Pre-hook of the block."""
        self.sums.read(self.block, inputs[0], self.current["down"][None], self.current["up"][None])

    def feed(
        self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Hook of the block."""
        return self.sums.feed(self.block, self.spec, output)


@register
class DtlPart(Part):
    """A low-rank map of what each block reads, summed over the blocks."""

    name, pack_order, stage = "dtl", 14, Stage.BRANCHES
    needs, no_weight = MLP_BLOCKS, "what it adds to a block is Swish of a sum over the blocks"

    def plan(self, spec: Dtl, site: Site) -> list[PlannedTensor]:
        """Two matrices per block. Raises BackboneError as `_first_fed`."""
        planned = []
        for block in _sites(spec, site):
            down, up = _address(block, "down"), _address(block, "up")
            shapes = ((spec.rank, block.width), (block.width, spec.rank))
            planned += [
                PlannedTensor("adapters", down, shapes[0], spec.bits, start="linear"),
                PlannedTensor("adapters", up, shapes[1], spec.bits, start="up"),
            ]
        return planned

    def attach(self, spec: Dtl, assembly: Assembly) -> None:
        """Hook a map into every block; trained tokens are read, and cut off after the sum."""
        blocks = _sites(spec, assembly.site)
        sums, first = SideSums(blocks), _first_fed(spec, assembly.site.backbone)
        assembly.model.register_forward_hook(sums.end_pass, always_call=True)
        for block in blocks:
            side, module = SideMap(block, spec, sums), assembly.model.get_submodule(block.name)
            assembly.modules[f"dtl.{block.name}"] = side
            module.register_forward_pre_hook(side.read)
            if block.number >= first:
                module.register_forward_hook(side.feed, prepend=True)

    def mix(self, network: SharedNetwork) -> Mixing:
        """Hook into all blocks; every lane has its own sums."""
        for block in side_blocks(network.site.backbone):
            module = network.model.get_submodule(block.name)
            module.register_forward_pre_hook(partial(self._read_mixed, network, block))
            module.register_forward_hook(partial(self._feed_mixed, network, block), prepend=True)
        return Mixing.FREELY

    def _read_mixed(
        self, network: SharedNetwork, block: SideBlock, module: nn.Module, inputs: tuple[Any, ...]
    ) -> None:
        for lane in network.lanes(self):
            if lane.has(_address(block, "down")):
                down_SRD, up_SDR = (lane.values(_address(block, key)) for key in ("down", "up"))
                _sums_of(lane, network).read(block, lane.rows(inputs[0]), down_SRD, up_SDR)

    def _feed_mixed(
        self,
        network: SharedNetwork,
        block: SideBlock,
        module: nn.Module,
        inputs: tuple[Any, ...],
        y: torch.Tensor,
    ) -> torch.Tensor:
        for lane in network.lanes(self):
            is_fed = block.number >= _first_fed(lane.spec, network.site.backbone)
            if is_fed and lane.has(_address(block, "down")):
                sums = _sums_of(lane, network)
                y = lane.change(y, partial(sums.feed, block, lane.spec))
        return y


def _address(block: SideBlock, key: str) -> str:
    return f"dtl.{block.name}.{key}"


def _sums_of(lane: Lane, network: SharedNetwork) -> SideSums:
    """Those of a lane, in the pass under way."""

    def make() -> SideSums:
        blocks = side_blocks(network.site.backbone)
        return SideSums([block for block in blocks if lane.has(_address(block, "down"))])

    return lane.once("sums", make)  # type: ignore[no-any-return]
