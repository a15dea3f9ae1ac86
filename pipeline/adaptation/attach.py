"""Building the adapted model from a frozen backbone and a recipe."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.adaptation.connections import TunedLayer
from pipeline.adaptation.norms import TunedNorm
from pipeline.adaptation.plan import HEAD_BIAS_BITS, PlannedTensor, mlp_slots, plan, tunable_layers
from pipeline.adaptation.quantiser import Quantised
from pipeline.adaptation.smoa import ParallelToMlp, SmoaBank
from pipeline.backbones import LoadedBackbone
from pipeline.spec import Head, Recipe

SelectedIndex = Mapping[str, torch.Tensor]
"""For each layer, the chosen columns of every neuron [O, K_max], strongest first."""


class AdaptedModel(nn.Module):
    """Frozen backbone, trained parts, head. Takes uint8 images [B, 3, S, S] (or floats in [0, 1]), gives logits [B, C].

    `trained` holds every trained tensor in the plan's order, `positions` the connections' columns [O, K] of each layer, ascending in every row.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: nn.Module, banks: Mapping[int, SmoaBank], head: LinearHead, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.banks = dict(banks)
        self.registered_banks = nn.ModuleDict({str(width): bank for width, bank in banks.items()})
        self.head = head
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.trained: dict[PlannedTensor, Quantised] = {}
        self.positions: dict[str, torch.Tensor] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for bank in self.banks.values():
            bank.begin_step()
        return self.head(self.backbone(self.normalise(images)))

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Scale uint8 images to [0, 1], then shift and scale each channel."""
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean) / self.std

    def train(self, mode: bool = True) -> AdaptedModel:
        """Only the banks know a training mode; the frozen network always runs as in evaluation."""
        super().train(False)
        for bank in self.banks.values():
            bank.train(mode)
        self.training = mode
        return self

    def auxiliary_loss(self) -> torch.Tensor:
        """Weighted load-balance terms of the last forward pass."""
        return sum((bank.spec.balance_weight * bank.balance_loss() for bank in self.banks.values()), start=torch.zeros(()))

    def trained_values(self) -> int:
        """Number of values the recipe trains."""
        return sum(tensor.values for tensor in self.trained)


class LinearHead(nn.Module):
    """A linear classifier: weight [C, F] at the head's bits, bias [C] at 16."""

    def __init__(self, width: int, class_count: int, spec: Head, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = Quantised(torch.empty(class_count, width).normal_(0, 0.02, generator=generator), spec.bits)
        self.bias = Quantised(torch.zeros(class_count), HEAD_BIAS_BITS)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight(), self.bias())


def attach(backbone: LoadedBackbone, recipe: Recipe, class_count: int, *, selected: SelectedIndex | None = None, seed: int = 0) -> AdaptedModel:
    """Attach a recipe to a backbone whose tensors stay shared and untouched.

    Args:
        selected: needed where the recipe trains connections; the first `top_k` columns of each row are taken.
        seed: of every initial value.

    Raises:
        BackboneError: a part of the recipe matches no module.
    """
    planned = plan(backbone, recipe, class_count)
    generator = torch.Generator().manual_seed(seed)
    model = backbone.fresh_model()
    slots = mlp_slots(model)
    handles: dict[str, Quantised] = {}

    tuned = _tune_layers(model, recipe, selected, generator)
    handles |= {f"connections:{name}": layer.connections for name, layer in tuned.items() if layer.connections is not None}
    handles |= {f"biases:{name}": layer.bias for name, layer in tuned.items() if layer.bias is not None}
    if recipe.norms is not None:
        for slot in slots:
            norm = TunedNorm(model.get_submodule(f"{slot.block}.{slot.norm}"), recipe.norms.bits, generator)
            model.set_submodule(f"{slot.block}.{slot.norm}", norm)
            handles |= {f"norms:{slot.block}.{slot.norm}.{name}": change for name, change in norm.changes.items()}  # type: ignore[misc]
    banks: dict[int, SmoaBank] = {}
    if recipe.smoa is not None:
        banks = {width: SmoaBank(width, recipe.smoa, generator) for width in sorted({slot.width for slot in slots})}
        for slot in slots:
            mlp = model.get_submodule(f"{slot.block}.mlp")
            model.set_submodule(f"{slot.block}.mlp", ParallelToMlp(mlp, banks[slot.width], slot.channels_first))
        handles |= {f"adapters:smoa.{width}.{name}": tensor for width, bank in banks.items() for name, tensor in bank.tensors.items()}
    head = LinearHead(backbone.width, class_count, recipe.head, generator)
    handles |= {"head:head.weight": head.weight, "head:head.bias": head.bias}

    adapted = AdaptedModel(model, banks, head, backbone.mean, backbone.std)
    adapted.trained = {tensor: handles[f"{tensor.part}:{tensor.name}"] for tensor in planned}
    adapted.positions = {name: layer.index_OK for name, layer in tuned.items() if layer.index_OK is not None}
    return adapted.train(False)


def _tune_layers(model: nn.Module, recipe: Recipe, selected: SelectedIndex | None, generator: torch.Generator) -> dict[str, TunedLayer]:
    if recipe.connections is None and recipe.biases is None:
        return {}
    bias_bits = recipe.biases.bits if recipe.biases is not None else None
    tuned: dict[str, TunedLayer] = {}
    for name, layer in tunable_layers(model).items():
        index_OK = None
        if recipe.connections is not None:
            assert selected is not None, "a recipe with connections needs a selection"
            index_OK = selected[name][:, : recipe.connections.top_k].long().sort(dim=1).values
        tuned[name] = TunedLayer(layer, index_OK, recipe.connections.bits if recipe.connections else 32, bias_bits, generator)
        model.set_submodule(name, tuned[name])
    return tuned
