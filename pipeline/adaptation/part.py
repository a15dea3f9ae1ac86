"""What a part is: one kind of trained values. Each is one file in `parts/`, which registers itself.

A part plans its tensors for a site, which fixes their shapes, bits and bytes before anything is
built, and attaches to a model the modules that use them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from pipeline.adaptation.blocks import MlpSlot, mlp_slots
from pipeline.adaptation.dropout import SeededDropout
from pipeline.adaptation.selected.ranking import SelectedIndex
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.backbones import LoadedBackbone
from pipeline.specs import Recipe

MLP_BLOCKS = "it needs blocks with a norm next to an MLP (a child named mlp)"
"""Requirement of parts that attach to a block's MLP, as it ends an error message."""


class Receiver(Protocol):
    """A module that trained values are handed to: before each forward pass, `current` is filled."""

    current: dict[str, torch.Tensor]


class WeightChange:
    """A receiver whose values change frozen weights."""

    def own_parameters(self) -> list[nn.Parameter]:
        """The frozen parameters that trained changes are added to."""
        return []

    def merge(self, is_merged: bool) -> None:
        """Write the current changes into the weights for all further passes, or undo that."""

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """State dict of a plain module that computes the same."""
        raise NotImplementedError


class AuxiliaryTerm(nn.Module):
    """A receiver that adds a term to the training loss."""

    def begin_pass(self) -> None:
        """Forget the last forward pass."""
        raise NotImplementedError

    def loss(self) -> torch.Tensor:
        """The weighted term of the last forward pass."""
        raise NotImplementedError

    def remark(self, total: Callable[[int], int]) -> str:
        """What was odd about training, or nothing. `total` sums a count over processes."""
        return ""


class Stage(IntEnum):
    """When a part is attached. Later stages wrap or hook what earlier ones have left."""

    PARAMETERS = 1
    WEIGHTS = 2
    FACTORS = 3
    OUTPUTS = 4
    NORMS = 5
    TOKENS = 6
    MLPS = 7
    BRANCHES = 8
    NETWORK = 9


@dataclass(frozen=True, eq=False)
class Site:
    """Where a recipe attaches: its backbone and, where it trains connections, the selection."""

    backbone: LoadedBackbone
    recipe: Recipe
    selected: SelectedIndex | None = None

    @property
    def model(self) -> nn.Module:
        """The network as timm made it."""
        return self.backbone.model

    @cached_property
    def slots(self) -> list[MlpSlot]:
        """The blocks with an MLP."""
        return mlp_slots(self.backbone)


@dataclass(eq=False)
class Assembly:
    """A model that parts are being attached to. `modules` are the receivers, by address."""

    site: Site
    model: nn.Module
    seed: int
    modules: dict[str, Receiver] = field(default_factory=dict)
    dropouts: dict[str, SeededDropout] = field(default_factory=dict)

    def dropout(self, part: str, share: float) -> SeededDropout:
        """A new dropout, reseeded in every step of training."""
        self.dropouts[part] = SeededDropout(share, self.seed)
        return self.dropouts[part]


class Part(ABC):
    """One kind of trained values.

    `name` is its key in a recipe. `pack_order` says where its tensors stand in a pack: a new part
    takes the next free number. `needs` ends the error of a backbone that has no place for it.
    `no_weight` says why it cannot be written into the backbone's tensors; empty where it can.
    """

    name: ClassVar[str]
    pack_order: ClassVar[int]
    stage: ClassVar[Stage]
    needs: ClassVar[str] = ""
    no_weight: ClassVar[str] = ""

    def spec(self, recipe: Recipe) -> Any:
        """The part's section of a recipe, or None."""
        return getattr(recipe, self.name)

    @abstractmethod
    def plan(self, spec: Any, site: Site) -> list[PlannedTensor]:
        """The tensors that train; none where nothing matches.

        Raises:
            BackboneError: the backbone has no place for the part as it is set.
        """

    @abstractmethod
    def attach(self, spec: Any, assembly: Assembly) -> None:
        """Put the part's modules into the model, and its receivers into `assembly.modules`."""

    def address(self, tensor: PlannedTensor, modules: Mapping[str, Receiver]) -> tuple[str, str]:
        """Which module receives a tensor, and under which key: by default, the longest prefix of
        the tensor's name that is a module's address, and the rest of the name."""
        owner = tensor.name
        while owner not in modules:
            owner = owner.rpartition(".")[0]
        return owner, tensor.name[len(owner) + 1 :]

    def write(self, state: dict[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
        """Write into a backbone's `state` what is no module's `plain_tensors`: by default, nothing.

        Raises:
            ExportError: the state has no place for it.
        """
        return None


PARTS: dict[str, Part] = {}


def register(part: type[Part]) -> type[Part]:
    """Make a part known under its name."""
    PARTS[part.name] = part()
    return part


def parts_of(recipe: Recipe) -> Iterator[tuple[Part, Any]]:
    """The parts that a recipe trains, each with its section, in the order of a pack."""
    for part in sorted(PARTS.values(), key=lambda part: part.pack_order):
        if (spec := part.spec(recipe)) is not None:
            yield part, spec
