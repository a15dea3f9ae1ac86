"""What a part is: one kind of trained values. Each is one file in `parts/`, which registers itself.

A part plans its tensors for a site, which fixes their shapes, bits and bytes before anything is
built, and attaches to a model the modules that use them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from pipeline.adaptation.blocks import MlpSlot, mlp_slots
from pipeline.adaptation.depth import blocks_of, checked_block
from pipeline.adaptation.dropout import SeededDropout
from pipeline.adaptation.selected.ranking import SelectedIndex
from pipeline.adaptation.sites import TunableLayer, norms_of, tunable_layers, weight_shapes
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.adaptation.watched import learnt_once
from pipeline.backbones import LoadedBackbone
from pipeline.specs import Recipe

if TYPE_CHECKING:
    from pipeline.adaptation.lanes import Lane, MixedBatch

MLP_BLOCKS = "it needs blocks with a norm next to an MLP (a child named mlp)"
"""Requirement of parts that attach to a block's MLP, as it ends an error message."""


class Receiver(Protocol):
    """A module that trained values are handed to: before each forward pass, `current` is filled
    with them or, for a key that has `frozen` values, with the sums of both.
    """

    current: dict[str, torch.Tensor]


class WeightChange:
    """A receiver whose values change frozen weights.

    `is_rounded`: whether autocast rounds the sums of frozen and trained values.
    """

    is_rounded = False

    def frozen(self, key: str) -> torch.Tensor | None:
        """The frozen values [...] that a trained tensor of the same number of values is added to
        before it is handed out; None where the module does that itself.
        """
        return None

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


@learnt_once
def _layers_of(backbone: LoadedBackbone) -> Mapping[str, TunableLayer]:
    return tunable_layers(backbone.model)


@learnt_once
def _norms_of(backbone: LoadedBackbone) -> Mapping[str, nn.Module]:
    return norms_of(backbone.model)


@learnt_once
def _shapes_of(backbone: LoadedBackbone) -> Mapping[str, tuple[int, int]]:
    return weight_shapes(backbone.model)


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
        """The blocks with an MLP that the recipe may change."""
        return [slot for slot in mlp_slots(self.backbone) if self._may_change_module(slot.block)]

    @cached_property
    def layers(self) -> dict[str, TunableLayer]:
        """The tunable layers that the recipe may change, by name."""
        found = _layers_of(self.backbone)
        return {name: layer for name, layer in found.items() if self._may_change_module(name)}

    @property
    def weight_shapes(self) -> Mapping[str, tuple[int, int]]:
        """As `sites.weight_shapes`, of the backbone."""
        return _shapes_of(self.backbone)

    @cached_property
    def norms(self) -> dict[str, nn.Module]:
        """The norms that the recipe may change, by name."""
        found = _norms_of(self.backbone)
        return {name: norm for name, norm in found.items() if self._may_change_module(name)}

    def may_change(self, parameter: str) -> bool:
        """Whether parts may change a parameter of the backbone, by name: those before the recipe's
        `from_block` stay as they are, and those of a decoder that trains as a whole are its own.
        Raises BackboneError if there is no such block.
        """
        if self.recipe.decoder is not None and parameter.startswith("decoder."):
            return False
        first = self._first_block
        return not first or blocks_of(self.backbone)[parameter] >= first

    @cached_property
    def _first_block(self) -> int:
        first = self.recipe.from_block
        return checked_block(self.backbone, first) if first else 0

    def _may_change_module(self, name: str) -> bool:
        if not self._first_block and self.recipe.decoder is None:
            return True
        parameters = self.model.get_submodule(name).named_parameters()
        return all(self.may_change(f"{name}.{own}") for own, _ in parameters)


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


class Mixing(Enum):
    """Which packs that have a part can pass a network together, in one batch."""

    APART = "none: its packs run one after the other"
    ALIKE = "those that have it in the same structure; no others"
    FREELY = "any, and any packs without it"


@dataclass(eq=False)
class SharedNetwork:
    """A network that samples of many packs pass together. `batch` are those of the pass under
    way, `noted` what one part leaves there for another.
    """

    site: Site
    model: nn.Module
    batch: MixedBatch | None = None
    noted: dict[str, torch.Tensor] = field(default_factory=dict)

    def lanes(self, part: Part) -> list[Lane]:
        """The samples of this pass whose packs have a part."""
        return [] if self.batch is None else self.batch.lanes(part.name)

    def after(
        self,
        part: Part,
        tensor: str,
        module: nn.Module,
        function: Callable[[Lane, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        """Change a module's output, lane by lane: `function` of a lane of `part` that has `tensor`,
        and of the lane's rows of the output and of the input, gives the rows of the new output.
        """

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            for lane in self.lanes(part):
                if lane.has(tensor):
                    y = lane.change(y, partial(function, lane), inputs[0])
            return y

        module.register_forward_hook(hook)


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

    def mix(self, network: SharedNetwork) -> Mixing:
        """Change a shared network so that every sample passes with the values of its own pack; says
        which packs can then pass together.

        By default, the network is left alone, and packs with this part pass one after the other.
        """
        return Mixing.APART

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
