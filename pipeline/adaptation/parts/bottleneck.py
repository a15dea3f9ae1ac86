"""Bottleneck adapters, one per block.

    a(x) = scale * up(dropout(relu(down(x))))        no biases; down is [H, D], up [D, H]

    parallel           x + mlp(norm2(x)) + a(x)      AdaptFormer (arXiv 2205.13535): x is the
                                                     residual stream, not normalised
    after_mlp          x + h + a(h)                  h = mlp(norm2(x)); Pfeiffer (arXiv 2005.00247)
    after_attention    x + h + a(h)                  h = attn(norm1(x))
    after_both         the last two together         Houlsby (arXiv 1902.00751)

Forward hooks add the output where a branch ends, after LayerScale or ConvNeXt's gamma, so the
block's own code and names stay as they are. Their low-bit form is Binary Adapter (arXiv
2307.16867). Shapes: D width of the backbone, H width of the bottleneck.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.adaptation.blocks import Branch, MlpSlot
from pipeline.adaptation.branch_ends import BranchEnd, BranchStream
from pipeline.adaptation.dropout import SeededDropout
from pipeline.adaptation.part import (
    MLP_BLOCKS,
    PARTS,
    Assembly,
    Mixing,
    Part,
    SharedNetwork,
    Site,
    Stage,
    register,
)
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.errors import BackboneError
from pipeline.specs import Adapter

if TYPE_CHECKING:
    from pipeline.adaptation.lanes import Lane


class Bottleneck(nn.Module):
    """One adapter. `current` holds this forward pass's `down` [H, D] and `up` [D, H]."""

    def __init__(
        self, spec: Adapter, dropout: SeededDropout, block: nn.Module, branch: Branch
    ) -> None:
        super().__init__()
        self.scale, self.channels_first = spec.scale, branch.channels_first
        self.dropout = [dropout]  # in a list: its mode is set in one place, for all adapters
        self.current: dict[str, torch.Tensor] = {}
        self._stream = BranchStream(block, branch) if spec.placement == "parallel" else None
        BranchEnd(block, branch, self._add_to_branch)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The adapter's output for inputs [..., D] (or [B, D, H, W] where channels come first),
        added to `residual` of the same shape.
        """
        if self.channels_first:
            return self._add(x.movedim(1, -1), residual.movedim(1, -1)).movedim(-1, 1)
        return self._add(x, residual)

    def _add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        hidden_TH = self.dropout[0](
            F.relu(F.linear(x.reshape(-1, x.shape[-1]), self.current["down"]))
        )
        up_HD = (self.scale * self.current["up"]).T
        return torch.addmm(residual.reshape(-1, residual.shape[-1]), hidden_TH, up_HD).view(
            residual.shape
        )

    def _add_to_branch(self, output: torch.Tensor) -> torch.Tensor:
        stream = self._stream.take() if self._stream is not None else None
        return self(output if stream is None else stream.reshape(output.shape), output)


class MixedBottleneck:
    """The adapters of all packs at the end of one branch."""

    def __init__(
        self, prefix: str, network: SharedNetwork, block: nn.Module, branch: Branch
    ) -> None:
        self.prefix, self.network, self.channels_first = prefix, network, branch.channels_first
        self._stream = BranchStream(block, branch)
        BranchEnd(block, branch, self._change)

    def _change(self, output: torch.Tensor) -> torch.Tensor:
        stream, added = self._stream.take(), output
        for lane in self.network.lanes(PARTS[AdapterPart.name]):
            if lane.has(f"{self.prefix}.down"):
                reads_stream = lane.spec.placement == "parallel" and stream is not None
                x = stream.reshape(output.shape) if reads_stream else output  # type: ignore[union-attr]
                added = lane.change(added, partial(self._add, lane), x)
        return added

    def _add(self, lane: Lane, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        down_SHD, up_SDH = (lane.values(f"{self.prefix}.{key}") for key in ("down", "up"))
        if self.channels_first:
            x = x.movedim(1, -1)
        hidden_STH = F.relu(x.reshape(len(down_SHD), -1, x.shape[-1]) @ down_SHD.mT)
        if self.channels_first:
            y = y.movedim(1, -1)
        y_STD = y.reshape(len(down_SHD), -1, y.shape[-1])
        y = torch.baddbmm(y_STD, hidden_STH, up_SDH.mT, alpha=lane.spec.scale).view(y.shape)
        return y.movedim(-1, 1) if self.channels_first else y


def _branches(slot: MlpSlot, spec: Adapter) -> dict[str, Branch]:
    """The branches of a block that get an adapter."""
    wanted = {
        "parallel": ("mlp",),
        "after_mlp": ("mlp",),
        "after_attention": ("attention",),
        "after_both": ("mlp", "attention"),
    }
    found = {
        name: branch
        for name in wanted[spec.placement]
        for branch in [getattr(slot, name)]
        if branch is not None
    }
    return {
        name: branch
        for name, branch in found.items()
        if spec.placement != "parallel" or branch.stream is not None
    }


@register
class AdapterPart(Part):
    """A bottleneck in every block."""

    name, pack_order, stage = "adapter", 5, Stage.BRANCHES
    needs, no_weight = MLP_BLOCKS, "a ReLU stands between its two matrices"

    def plan(self, spec: Adapter, site: Site) -> list[PlannedTensor]:
        """Two matrices per adapter. Raises BackboneError where no block has the branch."""
        branches = {
            (slot.block, name): slot.width for slot in site.slots for name in _branches(slot, spec)
        }
        _check_branches({branch for _, branch in branches}, spec, site)
        planned = []
        for (block, branch), width in branches.items():
            prefix, shapes = f"adapter.{block}.{branch}", ((spec.width, width), (width, spec.width))
            planned += [
                PlannedTensor("adapters", f"{prefix}.down", shapes[0], spec.bits, start="linear"),
                PlannedTensor("adapters", f"{prefix}.up", shapes[1], spec.bits, start="up"),
            ]
        return planned

    def attach(self, spec: Adapter, assembly: Assembly) -> None:
        """Hook an adapter into every branch that has one planned."""
        dropout = assembly.dropout(self.name, spec.dropout)
        for slot in assembly.site.slots:
            for name, branch in _branches(slot, spec).items():
                block = assembly.model.get_submodule(slot.block)
                adapter = Bottleneck(spec, dropout, block, branch)
                assembly.modules[f"adapter.{slot.block}.{name}"] = adapter

    def mix(self, network: SharedNetwork) -> Mixing:
        """Hook into both branches of every block."""
        for slot in network.site.slots:
            for name, branch in {"mlp": slot.mlp, "attention": slot.attention}.items():
                if branch is not None:
                    block = network.model.get_submodule(slot.block)
                    MixedBottleneck(f"adapter.{slot.block}.{name}", network, block, branch)
        return Mixing.FREELY


def _check_branches(found: set[str], spec: Adapter, site: Site) -> None:
    """Raise BackboneError where the placement names a branch that no block has."""
    wanted = {"after_both": ("mlp", "attention"), "after_attention": ("attention",)}
    missing = [name for name in wanted.get(spec.placement, ("mlp",)) if name not in found]
    if not missing or not site.slots:
        return
    others = [
        placement
        for placement in ("parallel", "after_mlp", "after_attention")
        if any(_branches(slot, spec.changed(placement=placement)) for slot in site.slots)
    ]
    hint = f"choose {' or '.join(others)}" if others else "leave this part out"
    raise BackboneError(
        f"recipe.adapter.placement: given {spec.placement!r}; {type(site.model).__name__} has no"
        f" {missing[0]} branch whose ends are known; {hint}"
    )
