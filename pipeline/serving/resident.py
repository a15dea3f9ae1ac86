"""One backbone in memory, changed in place from pack to pack.

A connection changes one entry of a weight: `W[o, i] + v`. Applying a pack writes the changed
entries into the resident weights and keeps what they overwrote, some kilobytes; undoing writes that
back. Both are copies of bits, so undoing is exact however often packs change, and costs as little
as the pack is large, not as the backbone is. The values written are those that `AdaptedModel`
computes with.

Only connections and biases are entries of the backbone; adapters, norms and the head are modules
beside it (`attach`).

Legend: N changed entries of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.errors import PackDamaged, PackError
from pipeline.packs import Pack, Part

IN_PLACE = ("connections", "biases")
"""The parts that are entries of the backbone's own tensors."""


@dataclass(frozen=True)
class _Change:
    """Entries of one tensor: their places, what they become, and what they were."""

    tensor: torch.Tensor
    index_N: torch.Tensor
    before_N: torch.Tensor
    after_N: torch.Tensor


class ResidentBackbone:
    """A plain timm model that carries one pack's connections and biases at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._applied: list[_Change] = []

    def apply(self, pack: Pack) -> None:
        """Write a pack's connections and biases, after undoing what another pack wrote.

        Raises:
            PackError: a part cannot be written into a backbone.
            PackDamaged: a part names a layer that this model does not have, or has in another
                shape; nothing is written then.
        """
        others = sorted({part.name for part in pack.parts} - {*IN_PLACE, "head"})
        if any(part.recomputed for part in pack.parts):
            raise PackError(
                f"task {pack.metadata.task!r}: the pack's positions are recomputed from the"
                " backbone; attach it instead"
            )
        if others:
            raise PackError(
                f"the pack of task {pack.metadata.task!r} has {', '.join(others)}, which are no"
                " entries of the backbone; attach it instead"
            )
        self.undo()
        changes = [
            change for part in pack.parts if part.name in IN_PLACE for change in self._changes(part)
        ]
        for change in changes:
            change.tensor.view(-1).index_copy_(0, change.index_N, change.after_N)
        self._applied = changes

    def undo(self) -> None:
        """Restore every entry, bit for bit."""
        for change in reversed(self._applied):
            change.tensor.view(-1).index_copy_(0, change.index_N, change.before_N)
        self._applied = []

    @property
    def kept_bytes(self) -> int:
        """What is kept for undoing."""
        return sum(change.index_N.nbytes + change.before_N.nbytes for change in self._applied)

    def _changes(self, part: Part) -> Iterator[_Change]:
        values = part.values()
        for number, spec in enumerate(part.tensors):
            tensor = self._tensor(spec.name, "weight" if part.layers else "bias")
            wanted = part.layers[number] if part.layers else spec.shape
            found = (len(tensor), tensor[0].numel()) if part.layers else tuple(tensor.shape)
            if found != wanted:
                raise PackDamaged(
                    f"{spec.name}: the pack changes entries of {wanted}, this model has {found};"
                    " give the backbone it belongs to"
                )
            index_N = (
                torch.from_numpy(part.positions[number])
                if part.layers
                else torch.arange(tensor.numel())
            )
            before_N = tensor.reshape(-1).take(index_N.to(tensor.device))
            after_N = before_N + torch.from_numpy(values[spec.name]).reshape(-1).to(tensor)
            yield _Change(tensor, index_N.to(tensor.device), before_N, after_N)

    def _tensor(self, module: str, kind: str) -> torch.Tensor:
        tensors = dict(self.model.named_parameters())
        tensor = tensors.get(
            f"{module}.{kind}", tensors.get(module)
        )  # biases beside layers go by their own names
        if tensor is None:
            raise PackDamaged(
                f"{module}.{kind}: the pack changes it, but this model does not have it; give the"
                " backbone it was trained on"
            )
        return tensor.detach()
