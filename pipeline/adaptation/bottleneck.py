"""Bottleneck adapters, one of its own in every block.

    a(x) = scale * up(dropout(relu(down(x))))        no biases; down is [H, D], up [D, H]

    parallel           x + mlp(norm2(x)) + a(x)      AdaptFormer (arXiv 2205.13535): x is the residual stream, not normalised
    after_mlp          x + h + a(h)                  h = mlp(norm2(x)); Pfeiffer (arXiv 2005.00247)
    after_attention    x + h + a(h)                  h = attn(norm1(x))
    after_both         the last two together         Houlsby (arXiv 1902.00751)

Forward hooks add the output where a branch ends, behind LayerScale or ConvNeXt's gamma, so the block's own code and names stay as they are.
Their low-bit form is Binary Adapter (arXiv 2307.16867). Shapes: D width of the backbone, H width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.adaptation.dropout import SeededDropout
from pipeline.adaptation.sites import MlpSlot
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.errors import BackboneError
from pipeline.spec import Adapter


class Bottleneck(nn.Module):
    """One adapter. `current` holds this forward pass's `down` [H, D] and `up` [D, H]."""

    def __init__(self, spec: Adapter, dropout: SeededDropout, channels_first: bool) -> None:
        super().__init__()
        self.scale, self.channels_first = spec.scale, channels_first
        self.dropout = [dropout]  # in a list: its mode is set in one place, for all adapters
        self.current: dict[str, torch.Tensor] = {}
        self._stream: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        """The adapter's output for inputs [..., D] (or [B, D, H, W] where channels come first), added to `beside` of the same shape."""
        if self.channels_first:
            return self._add(x.movedim(1, -1), beside.movedim(1, -1)).movedim(-1, 1)
        return self._add(x, beside)

    def _add(self, x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        hidden_TH = self.dropout[0](F.relu(F.linear(x.reshape(-1, x.shape[-1]), self.current["down"])))
        up_HD = (self.scale * self.current["up"]).T
        return torch.addmm(beside.reshape(-1, beside.shape[-1]), hidden_TH, up_HD).view(beside.shape)

    def keep_stream(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Pre-hook of the module that reads the residual stream."""
        self._stream = inputs[0]

    def add_to_branch(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Hook of the branch's end, for an adapter in parallel."""
        stream, self._stream = self._stream, None
        assert stream is not None, "the branch ended before it began"
        return self(stream.reshape(output.shape), output)

    def follow_branch(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Hook of the branch's end, for an adapter that reads the branch's output."""
        return self(output, output)


def _ends(slot: MlpSlot, spec: Adapter) -> dict[str, str | None]:
    """Which of a block's branches get an adapter, and the child that ends each."""
    ends = {"mlp": slot.mlp_end, "attention": slot.attention_end}
    if spec.placement == "after_both":
        return ends
    branch = "attention" if spec.placement == "after_attention" else "mlp"
    return {branch: ends[branch]}


def plan_adapter(slots: Sequence[MlpSlot], spec: Adapter) -> list[PlannedTensor]:
    """Two matrices an adapter. Raises BackboneError where a block lacks the branch it would follow."""
    planned = []
    for slot in slots:
        for branch, end in _ends(slot, spec).items():
            if end is None:
                raise BackboneError(
                    f"recipe.adapter.placement: given {spec.placement!r}; the block {slot.block!r} has no {branch} branch whose end is known; "
                    "choose a placement at another branch"
                )
            name = f"adapter.{slot.block}.{branch}"
            planned.append(PlannedTensor("adapters", f"{name}.down", (spec.width, slot.width), spec.bits, start="linear"))
            planned.append(PlannedTensor("adapters", f"{name}.up", (slot.width, spec.width), spec.bits, start="up"))
    return planned


def attach_adapter(model: nn.Module, slots: Sequence[MlpSlot], spec: Adapter, dropout: SeededDropout) -> dict[str, Bottleneck]:
    """Hook an adapter into every block that `plan_adapter` planned one for."""
    adapters = {}
    for slot in slots:
        block = model.get_submodule(slot.block)
        for branch, end in _ends(slot, spec).items():
            assert end is not None, "planned first"
            adapter = adapters[f"adapter.{slot.block}.{branch}"] = Bottleneck(spec, dropout, slot.stream_channels_first)
            if spec.placement == "parallel":
                block.get_submodule(slot.stream).register_forward_pre_hook(adapter.keep_stream)
                block.get_submodule(end).register_forward_hook(adapter.add_to_branch)
            else:
                block.get_submodule(end).register_forward_hook(adapter.follow_branch)
    return adapters
