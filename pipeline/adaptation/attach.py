"""Building the adapted model from a frozen backbone and a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.adaptation.blocks import MlpSlot, mlp_slots
from pipeline.adaptation.drop_path import attach_drop_path
from pipeline.adaptation.dropout import SeededDropout
from pipeline.adaptation.parts.bottleneck import attach_adapter
from pipeline.adaptation.parts.connections import TunedLayer
from pipeline.adaptation.parts.full import TunedNetwork
from pipeline.adaptation.parts.lora import LowRankLayer, attach_lora
from pipeline.adaptation.parts.norms import TunedNorm
from pipeline.adaptation.parts.prompts import attach_class_token, attach_generator, attach_prompts
from pipeline.adaptation.parts.smoa import ParallelToMlp, SmoaBank
from pipeline.adaptation.parts.ssf import attach_ssf
from pipeline.adaptation.recipe_plan import norm_names, norm_parameters, plan
from pipeline.adaptation.selected.ranking import SelectedIndex, kept_places
from pipeline.adaptation.sites import tunable_layers
from pipeline.adaptation.tensors import PlannedTensor, initial_values
from pipeline.adaptation.values import TrainedValues
from pipeline.adaptation.working import WorkingCopies
from pipeline.backbones import LoadedBackbone
from pipeline.specs import Norms, Recipe, Smoa


class LinearHead(nn.Module):
    """A linear classifier; `current` holds this forward pass's weight [C, F] and, where it has one, bias [C]."""

    def __init__(self) -> None:
        super().__init__()
        self.current: dict[str, torch.Tensor] = {}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.current["weight"], self.current.get("bias"))


class Receiver(Protocol):
    """A module that trained values are handed to: before each forward pass, `current` is filled with the tensors it uses."""

    current: dict[str, torch.Tensor]


class AdaptedModel(nn.Module):
    """Frozen backbone, trained parts, head. Takes uint8 images [B, 3, S, S] (or floats in [0, 1]), gives logits [B, C].

    `values` are the trained values; before each forward pass they are quantised once and handed to the modules that use them.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        backbone: nn.Module,
        modules: Mapping[str, Receiver],
        dropouts: Sequence[SeededDropout],
        values: TrainedValues,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.values = values
        head = modules["head"]
        assert isinstance(head, LinearHead)
        self.head = head
        self.banks = nn.ModuleList([module for module in modules.values() if isinstance(module, SmoaBank)])
        self.dropouts = nn.ModuleList(dropouts)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._tuned = {name.removeprefix("layer:"): module for name, module in modules.items() if isinstance(module, TunedLayer)}
        added_to = [module for module in modules.values() if isinstance(module, TunedLayer | TunedNorm | TunedNetwork)]
        self._own = [parameter for module in added_to for parameter in module.own_parameters()]
        self._mergeable = [module for module in modules.values() if isinstance(module, TunedLayer | LowRankLayer | TunedNetwork)]
        self._receivers = {tensor: (modules[address], key) for tensor in values.tensors for address, key in [_address(tensor, modules)]}
        self._is_merged = False
        self._training_dtype: torch.dtype | None = None
        self._copies: WorkingCopies | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self._is_merged:
            self._hand_out()
        return self.head(self.backbone(self.normalise(images)))

    def _hand_out(self) -> None:
        """Give every module its values, quantised once for this forward pass."""
        for bank in self._banks():
            bank.balance_terms.clear()
        for tensor, value in self.values().items():
            module, key = self._receivers[tensor]
            module.current[key] = value

    @torch.no_grad()
    def merge(self) -> None:
        """From now on infer at the backbone's own speed: values are quantised and written into the layers once, for all forward passes to come."""
        self.eval()
        self._hand_out()
        self._is_merged = True
        for module in self._mergeable:
            module.merge(True)

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """`merge`, and back to a model that can train."""
        self.merge()
        try:
            yield
        finally:
            self._is_merged = False
            for module in self._mergeable:
                module.merge(False)

    def compute_in(self, dtype: torch.dtype) -> None:
        """From the next `train()` on, train with the frozen tensors in `dtype`, under autocast where that is bfloat16. Evaluation stays as it is."""
        self.eval()
        self._training_dtype, self._copies = dtype, None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> AdaptedModel:
        """Move or cast the model's own tensors; whatever was derived from them is made anew in their new place.

        On a GPU, `to` swaps the data of parameters and keeps the objects. Copies made before would put the data of the
        old device back at the next change of mode, and merged weights would stay behind.
        """
        mode = self.training
        self.eval()
        self._copies = None
        super()._apply(fn, recurse)
        if self._is_merged:
            self.merge()
        return self.train(mode)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Scale uint8 images to [0, 1], then shift and scale each channel."""
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean) / self.std

    def train(self, mode: bool = True) -> AdaptedModel:
        """Only the banks and the adapters' dropout know a training mode; the frozen network always runs as in evaluation."""
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
        """Weighted load-balance terms of the last forward pass."""
        return sum((bank.spec.balance_weight * bank.balance_loss() for bank in self._banks()), start=torch.zeros((), device=self.mean.device))

    def reseed(self, generator: torch.Generator) -> None:
        """Draw a seed for each module that draws random numbers in training."""
        for dropout in self.dropouts:
            if isinstance(dropout, SeededDropout):
                dropout.reseed(int(torch.randint(1 << 62, (), generator=generator)))

    def positions(self) -> dict[str, torch.Tensor]:
        """The connections of each layer: places [N] in its weight seen as one row-major [O, I] matrix, ascending."""
        return {name: layer.index_N for name, layer in self._tuned.items() if layer.index_N is not None}

    @property
    def class_count(self) -> int:
        """Number of logits."""
        return next(tensor.shape[0] for tensor in self.values.tensors if tensor.name == "head.weight")

    def trained_values(self) -> int:
        """Number of values the recipe trains."""
        return sum(tensor.values for tensor in self.values.tensors)

    def expert_load(self) -> dict[str, list[int]]:
        """Tokens routed to each expert in training, by bank."""
        return {str(number): bank.expert_load.tolist() for number, bank in enumerate(self._banks())}

    def idle_experts(self, total: Callable[[int], int] = int) -> str:
        """What to say of experts that no token was ever sent to in training; empty where all were used. `total` sums a count over processes."""
        loads = {name: [total(tokens) for tokens in load] for name, load in self.expert_load().items()}
        idle = {name: load for name, load in loads.items() if sum(load) and 0 in load}
        return "; ".join(
            f"bank {name}: {load.count(0)} of {len(load)} experts were never used (tokens: {', '.join(map(str, load))}); "
            "try fewer experts, or a larger smoa.balance_weight"
            for name, load in idle.items()
        )

    def _banks(self) -> list[SmoaBank]:
        return [bank for bank in self.banks if isinstance(bank, SmoaBank)]


def attach(backbone: LoadedBackbone, recipe: Recipe, class_count: int, *, selected: SelectedIndex | None = None, seed: int = 0) -> AdaptedModel:
    """Attach a recipe to a backbone whose tensors stay shared and untouched.

    Args:
        selected: needed where the recipe trains connections; those that its `top_k` keeps are taken.
        seed: of every initial value.

    Raises:
        BackboneError: a part of the recipe matches no module.
    """
    planned = plan(backbone, recipe, class_count, selected)
    generator = torch.Generator().manual_seed(seed)
    values = TrainedValues({tensor: initial_values(tensor, generator) for tensor in planned})
    model = backbone.fresh_model()
    drop_path = recipe.training.drop_path
    slots = mlp_slots(backbone) if recipe.smoa or recipe.adapter or recipe.norms or drop_path else []
    dropouts = {name: SeededDropout(part.dropout, seed) for name in ("adapter", "lora") for part in [getattr(recipe, name)] if part is not None}
    modules: dict[str, Receiver] = {"head": LinearHead()}
    # Layers first, while they have the names that timm gave them.
    modules |= _tune_layers(model, recipe, selected)
    modules |= attach_lora(model, backbone, recipe.lora, dropouts["lora"]) if recipe.lora else {}
    modules |= attach_ssf(model, backbone) if recipe.ssf else {}
    modules |= _tune_norms(model, slots, recipe.norms) if recipe.norms else {}
    modules |= attach_prompts(model, recipe.prompts) if recipe.prompts else {}
    modules |= attach_class_token(model) if recipe.class_token else {}
    modules |= _attach_banks(model, slots, recipe.smoa) if recipe.smoa else {}
    if drop_path:
        dropouts["drop_path"] = attach_drop_path(model, slots, drop_path, seed)
    modules |= attach_adapter(model, slots, recipe.adapter, dropouts["adapter"]) if recipe.adapter else {}
    if recipe.full:
        model = modules["full"] = TunedNetwork(model)
    return AdaptedModel(model, modules, list(dropouts.values()), values, backbone.mean, backbone.std).train(False)


def _address(tensor: PlannedTensor, modules: Mapping[str, Receiver]) -> tuple[str, str]:
    """Which module receives a tensor, and under which key: the rest of the tensor's name behind the module's."""
    if tensor.part in ("connections", "biases"):
        return f"layer:{tensor.name}", "connections" if tensor.part == "connections" else "bias"
    owner = tensor.name
    while owner not in modules:
        owner = owner.rpartition(".")[0]
    return owner, tensor.name[len(owner) + 1 :]


def _tune_norms(model: nn.Module, slots: Sequence[MlpSlot], spec: Norms) -> dict[str, TunedNorm]:
    bases = {name: model.get_submodule(name) for name in norm_names(model, slots, spec)}
    norms = {name: TunedNorm(base, norm_parameters(base, spec)) for name, base in bases.items()}
    for name, norm in norms.items():
        model.set_submodule(name, norm)
    return norms


def _attach_banks(model: nn.Module, slots: Sequence[MlpSlot], spec: Smoa) -> dict[str, Receiver]:
    """The shared bank at every MLP, one for each width, and the generators that read its output."""
    generators = attach_generator(model) if spec.prompt_generator else {}
    banks = {width: SmoaBank(spec) for width in sorted({slot.width for slot in slots})}
    for slot in slots:
        name = f"{slot.block}.mlp"
        beside = ParallelToMlp(model.get_submodule(name), banks[slot.width], slot.channels_first, generators.get(f"generator.{slot.block}"))
        model.set_submodule(name, beside)
    return {**{f"smoa.{width}": bank for width, bank in banks.items()}, **generators}


def _tune_layers(model: nn.Module, recipe: Recipe, selected: SelectedIndex | None) -> dict[str, Receiver]:
    if recipe.connections is None and recipe.biases is None:
        return {}
    places: dict[str, torch.Tensor] = {}
    if recipe.connections is not None:
        assert selected is not None, "a recipe with connections needs a selection"
        places = kept_places(selected, recipe.connections.top_k)
    modules: dict[str, Receiver] = {}
    for name, layer in tunable_layers(model).items():
        tuned = modules[f"layer:{name}"] = TunedLayer(layer, places.get(name))
        model.set_submodule(name, tuned)
    return modules
