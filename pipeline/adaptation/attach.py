"""Building the adapted model from a frozen backbone and a recipe."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from pipeline.adaptation.blocks import mlp_slots
from pipeline.adaptation.drop_path import attach_drop_path
from pipeline.adaptation.dropout import SeededDropout
from pipeline.adaptation.head import LinearHead
from pipeline.adaptation.map_head import make_head
from pipeline.adaptation.part import (
    MLP_BLOCKS,
    Assembly,
    AuxiliaryTerm,
    Receiver,
    Site,
    Stage,
    WeightChange,
    parts_of,
)
from pipeline.adaptation.parts.connections import TunedLayer
from pipeline.adaptation.recipe_plan import plan_head, plan_parts
from pipeline.adaptation.recompute import recompute_blocks
from pipeline.adaptation.selected.ranking import SelectedIndex
from pipeline.adaptation.sums import Sums
from pipeline.adaptation.tensors import PlannedTensor, initial_values
from pipeline.adaptation.trunk import Trunk
from pipeline.adaptation.values import TrainedValues
from pipeline.adaptation.working import WorkingCopies
from pipeline.backbones import LoadedBackbone
from pipeline.data.modality import Modality
from pipeline.errors import BackboneError
from pipeline.specs import Recipe
from pipeline.utils.devices import autocast, to_device


class AdaptedModel(nn.Module):
    """Frozen backbone, trained parts, head. `takes` samples as they are decoded (uint8 images [B,
    3, S, S]) or augmented, gives logits [B, C], or [B, C, S, S] of a backbone that gives maps.

    `values` are the trained values; before each forward pass they are quantised once, added to the
    frozen ones that they change, and handed to the modules that use them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        receivers: Mapping[PlannedTensor, tuple[Receiver, str]],
        dropouts: Sequence[SeededDropout],
        values: TrainedValues,
        takes: Modality,
        trunk: Trunk | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.values = values
        modules = {id(module): module for module, _ in receivers.values()}.values()
        self.head = next(module for module in modules if isinstance(module, LinearHead))
        self.banks = nn.ModuleList([each for each in modules if isinstance(each, AuxiliaryTerm)])
        self.dropouts = nn.ModuleList(dropouts)
        self.takes, self.normalise = takes, takes.normaliser()
        self._receivers = dict(receivers)
        self.sums = Sums(values, receivers)
        self._changes = [module for module in modules if isinstance(module, WeightChange)]
        self._own = [parameter for change in self._changes for parameter in change.own_parameters()]
        self._trunk = trunk
        self._merged_in: torch.dtype | None = None
        self._training_dtype: torch.dtype | None = None
        self._copies: WorkingCopies | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._merged_in is None:
            self._hand_out()
        if self._merged_in is not torch.bfloat16:
            return self.head(self.backbone(self.normalise(images)))
        with autocast(images.device, self._merged_in):
            features = self.backbone(self.normalise(images))
        return self.head(features.float())

    @property
    def device(self) -> torch.device:
        """Where its values are."""
        return next(self.values.parameters()).device

    @property
    def keeps_trunk(self) -> bool:
        """Whether images are computed once up to the first block that changes."""
        return self._trunk is not None

    def inputs_of(self, images: torch.Tensor) -> torch.Tensor:
        """What `logits_of` takes: the images on the model's device or, of a model that keeps its
        trunk, what the blocks that are not changed make of uint8 images on the CPU. Each of these
        is computed once per process, as long as there is room.
        """
        if self._trunk is None:
            return to_device(images, self.device)

        def run(some: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.backbone(self.normalise(to_device(some, self.device)))
            return features

        return self._trunk.outputs(run, images)

    def logits_of(self, inputs: torch.Tensor) -> torch.Tensor:
        """The logits of the images with these `inputs_of`."""
        if self._trunk is None:
            return self(inputs)  # type: ignore[no-any-return]
        if self._merged_in is None:
            self._hand_out()
        return self.head(self._trunk.resume(self.backbone, inputs))

    def _hand_out(self) -> None:
        """Give every module its values, quantised once for this forward pass."""
        for term in self._terms():
            term.begin_pass()
        for tensor, value in self.sums().items():
            module, key = self._receivers[tensor]
            module.current[key] = value

    @torch.no_grad()
    def merge(self, dtype: torch.dtype = torch.float32) -> None:
        """Prepare for inference at the backbone's own speed: quantise the values and write them
        into the layers once, for all further forward passes. In these, products are computed in
        `dtype`, but those of a linear head in float32, so that bfloat16 makes no ties.
        """
        self.eval()
        self._hand_out()
        self._merged_in = dtype
        for module in self._changes:
            module.merge(True)

    @contextlib.contextmanager
    def merged(self, dtype: torch.dtype = torch.float32) -> Iterator[None]:
        """Context manager: `merge` on entry, a trainable model again on exit."""
        self.merge(dtype)
        try:
            yield
        finally:
            self._merged_in = None
            for module in self._changes:
                module.merge(False)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Train with the frozen tensors in `dtype` from the next `train()` on, under autocast if it
        is bfloat16. Evaluation is unchanged.
        """
        self.eval()
        self._training_dtype, self._copies = dtype, None

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> AdaptedModel:
        """Move or cast the model's own tensors, and rebuild what was derived from them on the new
        device.

        On a GPU, `to` swaps the data of parameters and keeps the objects. Copies made before would
        put the data of the old device back at the next change of mode, and merged weights would
        stay behind.
        """
        mode = self.training
        self.eval()
        self._copies = None
        super()._apply(fn, recurse)
        if self._merged_in is not None:
            self.merge(self._merged_in)
        return self.train(mode)

    def train(self, mode: bool = True) -> AdaptedModel:
        """Switch the mode of the banks and of the adapters' dropout; the frozen network always runs
        in evaluation mode.
        """
        super().train(False)
        self.banks.train(mode)
        self.dropouts.train(mode)
        self.training = mode
        if mode and self._copies is None and self._training_dtype is not None:
            self._copies = WorkingCopies(self.backbone, self._training_dtype, self._own)
        if self._copies is not None:
            self._copies.use(mode)
        return self

    def auxiliary_loss(self) -> torch.Tensor:
        """Sum of the parts' terms of the training loss in the last forward pass, such as the banks'
        load balance."""
        losses = [term.loss() for term in self._terms()] or [torch.zeros((), device=self.device)]
        return functools.reduce(torch.add, losses)

    def reseed(self, generator: torch.Generator) -> None:
        """Draw a seed for each module that draws random numbers in training."""
        for dropout in self.dropouts:
            if isinstance(dropout, SeededDropout):
                dropout.reseed(int(torch.randint(1 << 62, (), generator=generator)))

    def rewind(self) -> None:
        """Set the generators back to where `reseed` has set them, for another try of a step."""
        for dropout in self.dropouts:
            if isinstance(dropout, SeededDropout):
                dropout.reseed(dropout.seed)

    def generators(self) -> list[torch.Generator]:
        """The random generators that forward passes have drawn from."""
        return [
            generator
            for dropout in self.dropouts
            if isinstance(dropout, SeededDropout)
            for generator in dropout.generators()
        ]

    def positions(self) -> dict[str, torch.Tensor]:
        """The connections of each layer: ascending flat indices [N] into its weight seen as an
        [O, I] matrix.
        """
        tuned = {
            tensor.name: module
            for tensor, (module, _) in self._receivers.items()
            if tensor.part == "connections" and isinstance(module, TunedLayer)
        }
        return {name: layer.index_N for name, layer in tuned.items() if layer.index_N is not None}

    @property
    def class_count(self) -> int:
        """Number of logits."""
        return next(
            tensor.shape[0] for tensor in self.values.tensors if tensor.name == "head.weight"
        )

    def trained_values(self) -> int:
        """Number of values the recipe trains."""
        return sum(tensor.values for tensor in self.values.tensors)

    def idle_experts(self, total: Callable[[int], int] = int) -> str:
        """Message about experts that received no token during training; empty if there are none.
        `total` sums a count over processes."""
        remarks = [term.remark(total) for term in self._terms()]
        return "; ".join(
            f"bank {number}: {remark}" for number, remark in enumerate(remarks) if remark
        )

    def _terms(self) -> list[AuxiliaryTerm]:
        return [term for term in self.banks if isinstance(term, AuxiliaryTerm)]


def attach(
    backbone: LoadedBackbone,
    recipe: Recipe,
    class_count: int,
    *,
    selected: SelectedIndex | None = None,
    seed: int = 0,
    keeps_trunk: bool = False,
) -> AdaptedModel:
    """Attach a recipe to a backbone whose tensors stay shared and untouched.

    Args:
        selected: required if the recipe trains connections; those that its `top_k` keeps are
            used.
        seed: of every initial value.
        keeps_trunk: compute images once up to the recipe's `from_block`, if it has one.

    Raises:
        BackboneError: a part of the recipe matches no module, or the head's rank exceeds the
            feature.
    """
    site = Site(backbone, recipe, selected)
    planned, head = plan_parts(site), plan_head(backbone, class_count, recipe)
    tensors = [*(tensor for tensors in planned.values() for tensor in tensors), *head]
    generator = torch.Generator().manual_seed(seed)
    values = TrainedValues({tensor: initial_values(tensor, generator) for tensor in tensors})
    network = backbone.fresh_model()
    classifier = make_head(backbone, network, recipe.head)
    assembly = Assembly(site, network, seed)
    _attach_parts(assembly)
    order = [*(part.name for part in planned), "drop_path"]
    dropouts = [assembly.dropouts[name] for name in order if name in assembly.dropouts]
    if recipe.training.recompute:
        recompute_blocks(_blocks(site, network), dropouts)
    first = recipe.from_block if keeps_trunk else None
    trunk = Trunk(network, backbone, first) if first else None
    modules = assembly.modules
    receivers: dict[PlannedTensor, tuple[Receiver, str]] = {}
    for part, part_tensors in planned.items():
        for tensor in part_tensors:
            address, key = part.address(tensor, modules)
            receivers[tensor] = modules[address], key
    receivers |= {tensor: (classifier, tensor.name.removeprefix("head.")) for tensor in head}
    return AdaptedModel(assembly.model, receivers, dropouts, values, backbone.takes, trunk).train(
        False
    )


def _blocks(site: Site, network: nn.Module) -> list[nn.Module]:
    """The blocks of a network that can be computed again. Raises BackboneError."""
    names = [slot.block for slot in mlp_slots(site.backbone)]
    found = [network.get_submodule(name) for name in names if not name.startswith("decoder.")]
    if not found:
        raise BackboneError(
            f"recipe.training.recompute: {MLP_BLOCKS}; leave it out, or set a smaller micro_batch"
        )
    return found


def _attach_parts(assembly: Assembly) -> None:
    """Attach every part of the recipe, stage by stage, and drop path before what ends branches."""
    recipe, rate = assembly.site.recipe, assembly.site.recipe.training.drop_path
    parts = sorted(parts_of(recipe), key=lambda each: each[0].stage)
    for part, spec in [each for each in parts if each[0].stage < Stage.BRANCHES]:
        part.attach(spec, assembly)
    if rate:
        assembly.dropouts["drop_path"] = attach_drop_path(
            assembly.model, assembly.site.slots, rate, assembly.seed
        )
    for part, spec in [each for each in parts if each[0].stage >= Stage.BRANCHES]:
        part.attach(spec, assembly)
