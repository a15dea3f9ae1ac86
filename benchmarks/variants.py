"""The ways to train that the step benchmarks compare, each as a model and its step: ours, full
fine-tuning, LoRA, SHiRA, dense masks.

The others get whatever makes them faster: fused AdamW, one parameter group, and, in bfloat16 on a
CPU, attention written out, since torch's fused kernel has a slow backward pass there ("as timm runs
it" is the same without that). Needs `pip install peft` for LoRA and SHiRA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.adaptation import AdaptedModel, SelectedIndex, attach, rank_indices
from pipeline.adaptation.parts.connections import TunedLayer
from pipeline.adaptation.sites import tunable_layers
from pipeline.adaptation.sums import WrittenWeights
from pipeline.adaptation.working import fuse_attention, slow_fused_attention
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.data import two_views
from pipeline.selection import supervised_contrastive_loss
from pipeline.specs import DEFAULT_RECIPE, Backbone, Biases, Connections, Head, Input, Recipe, Smoa
from pipeline.specs.catalogue import catalogue_folder
from pipeline.specs.task_files import load_task
from pipeline.training.recorded import RecordedStep, Step

CLASSES = 10
FULL = "full fine-tuning"
BOUND = "nothing but the head, input gradients down to the pixels"
HEAD = Head(bits=32)
MAX_TOP_K = 8


@dataclass
class Variant:
    """A model's step, and the bytes of what lives beside the weights it multiplies with.

    persistent: trained values, gradients and optimiser states. places: what says which entries
    train: positions, or masks.
    """

    name: str
    step: Callable[[], None]
    persistent: Callable[[], int]
    places: int


@dataclass(frozen=True)
class Setting:
    """What all variants of one table share."""

    backbone: LoadedBackbone
    images: torch.Tensor
    labels: torch.Tensor
    precision: str
    device: str
    selected: SelectedIndex
    is_recorded: bool = False
    """Whether steps are recorded as CUDA graphs and replayed."""


def backbone_of(model: str, size_px: int) -> LoadedBackbone:
    """`embedded` with its weights, or any timm model with random ones."""
    if model == "embedded":
        return load_backbone(
            load_task(catalogue_folder() / "demo" / "digits.yaml").backbone, Input(size_px=size_px)
        )
    return load_backbone(Backbone(model=model, weights="random"), Input(size_px=size_px))


def make_setting(backbone: LoadedBackbone, batch: int, precision: str, device: str) -> Setting:
    """Scikit-learn's digits at the backbone's size, and the connections that this batch selects."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    numbers = np.arange(batch) % len(digits.images)
    pixels = torch.from_numpy(digits.images[numbers] / 16).float()[:, None].expand(-1, 3, -1, -1)
    images = (
        (F.interpolate(pixels, size=backbone.size_px, mode="bilinear") * 255)
        .to(torch.uint8)
        .to(device)
    )
    labels = torch.from_numpy(digits.target[numbers]).to(device)
    return Setting(
        backbone,
        images,
        labels,
        precision,
        device,
        select_connections(backbone, images[:64], labels[:64], device, MAX_TOP_K),
    )


def select_connections(
    backbone: LoadedBackbone, images: torch.Tensor, labels: torch.Tensor, device: str, top_k: int
) -> SelectedIndex:
    """The connections that one batch selects."""
    model = copy.deepcopy(backbone.model).to(device)
    for layer in tunable_layers(model).values():
        layer.weight.requires_grad_(True)
    views = two_views(images.cpu(), torch.Generator().manual_seed(0), flip=False).to(device)
    supervised_contrastive_loss(model(views), labels.repeat(2), 0.07).backward()
    gradients = {
        name: layer.weight.grad.flatten(1)  # type: ignore[union-attr]
        for name, layer in tunable_layers(model).items()
    }
    return rank_indices(gradients, "neuron", top_k)


def connections(top_k: int, bits: Any = 32) -> Recipe:
    """Connections and biases."""
    return Recipe(
        connections=Connections(top_k=top_k, bits=bits),
        biases=Biases(bits=32 if bits == 32 else 8),
        head=HEAD,
    )


def smoa(experts: int, bits: Any = 32, width: int = 8) -> Recipe:
    """A shared bank alone."""
    return Recipe(smoa=Smoa(experts=experts, width=width, bits=bits), head=HEAD)


HOUSE = connections(1, 1).model_copy(update={"smoa": smoa(8, 1).smoa})
OURS = {
    "connections K=1": connections(1),
    "connections K=3": connections(3),
    "connections K=1, 1 bit": connections(1, 1),
    "SMoA E=1": smoa(1),
    "SMoA E=8": smoa(8),
    "SMoA E=8, 1 bit": smoa(8, 1),
    "connections K=1 + SMoA E=8, 1 bit": HOUSE,
    "default recipe": DEFAULT_RECIPE,
}


def builders(setting: Setting) -> dict[str, Callable[[], Variant]]:
    """For each variant what builds it, so that only one need be in memory at a time."""
    others: dict[str, Callable[[str, Setting], Variant]] = {
        FULL: full,
        "full fine-tuning, as timm runs it": full_as_it_is,
        "dense masks (GPS code)": dense_masks,
        "LoRA r=8 (peft)": lora,
        "SHiRA r=1 (peft)": shira,
    }
    if setting.device != "cpu" or setting.precision != "bf16":
        del others["full fine-tuning, as timm runs it"]  # it is the first, then
    others[BOUND] = input_gradients
    found: dict[str, Callable[[], Variant]] = {
        name: partial(build, name, setting) for name, build in others.items()
    }
    return found | {name: partial(ours, name, setting, recipe) for name, recipe in OURS.items()}


def _variant(
    name: str,
    setting: Setting,
    model: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    after: Callable[[], None] | None = None,
    places: int = 0,
    auxiliary_loss: Callable[[], torch.Tensor] | None = None,
) -> Variant:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        trained, lr=1e-4, weight_decay=0.0, fused=True, capturable=setting.is_recorded
    )
    # Full fine-tuning's trained values are its weights; elsewhere they stand beside them.
    are_weights = (
        sum(parameter.numel() for parameter in trained)
        > sum(parameter.numel() for parameter in setting.backbone.model.parameters()) / 2
    )

    def train_on(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.precision == "bf16"):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        (loss if auxiliary_loss is None else loss + auxiliary_loss()).backward()
        if after is not None:
            after()
        optimiser.step()
        return loss.detach()

    run: Step = train_on
    if setting.is_recorded:
        generators = model.generators if isinstance(model, AdaptedModel) else tuple
        run = RecordedStep(train_on, setting.device, generators)

    def step() -> None:
        run(setting.images, setting.labels)

    def persistent() -> int:
        states = sum(
            value.nbytes
            for state in optimiser.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        )
        values = sum(parameter.nbytes for parameter in trained)
        # Gradients, all alive at the end of a backward pass, are as large as the values.
        return states + values + (0 if are_weights else values)

    return Variant(name, step, persistent, places)


def _dtype(setting: Setting) -> torch.dtype:
    return torch.bfloat16 if setting.precision == "bf16" else torch.float32


def _plain(setting: Setting, *, has_best_attention: bool = True) -> nn.Sequential:
    """A copy of the backbone, and a head."""
    network = copy.deepcopy(setting.backbone.model).to(setting.device)
    if has_best_attention:
        fuse_attention(slow_fused_attention(network, _dtype(setting)), False)
    return nn.Sequential(network, nn.Linear(setting.backbone.width, CLASSES)).to(setting.device)


def _from_pixels(setting: Setting, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    mean, std = (
        torch.tensor(values, device=setting.device).view(1, 3, 1, 1)
        for values in (setting.backbone.images.mean, setting.backbone.images.std)
    )
    return lambda images: model((images.float() / 255 - mean) / std)


def full(name: str, setting: Setting, *, has_best_attention: bool = True) -> Variant:
    """Every weight trains."""
    model = _plain(setting, has_best_attention=has_best_attention).requires_grad_(True)
    return _variant(name, setting, model, _from_pixels(setting, model))


def full_as_it_is(name: str, setting: Setting) -> Variant:
    """The same with timm's choice of attention."""
    return full(name, setting, has_best_attention=False)


def dense_masks(name: str, setting: Setting) -> Variant:
    """As GPS's released code trains: every gradient dense, multiplied by a dense mask."""
    model = _plain(setting).requires_grad_(True)
    masks: dict[torch.Tensor, torch.Tensor] = {}
    for layer_name, layer in tunable_layers(model[0]).items():
        flat = torch.zeros(layer.weight.numel(), device=setting.device)
        masks[layer.weight] = flat.scatter_(
            0, setting.selected[layer_name].at(1).to(setting.device), 1.0
        ).view(layer.weight.shape)

    def mask() -> None:
        for parameter, kept in masks.items():
            assert parameter.grad is not None
            parameter.grad.mul_(kept)

    return _variant(
        name,
        setting,
        model,
        _from_pixels(setting, model),
        mask,
        sum(kept.nbytes for kept in masks.values()),
    )


def lora(name: str, setting: Setting) -> Variant:
    """peft's LoRA on every Linear."""
    from peft import LoraConfig

    return _peft(name, setting, lambda names: LoraConfig(r=8, target_modules=names))


def shira(name: str, setting: Setting) -> Variant:
    """peft's SHiRA on every Linear: random positions, and the dense gradient."""
    from peft import ShiraConfig

    return _peft(name, setting, lambda names: ShiraConfig(r=1, target_modules=names))


def _peft(name: str, setting: Setting, config: Callable[[list[str]], Any]) -> Variant:
    from peft import get_peft_model

    plain = _plain(setting)
    names = [layer for layer, module in plain[0].named_modules() if isinstance(module, nn.Linear)]
    plain[0] = get_peft_model(plain[0], config(names))  # type: ignore[arg-type]
    model = plain.to(setting.device)
    places = sum(
        indices.nbytes
        for module in model.modules()
        for indices in getattr(module, "shira_indices", {}).values()
    )
    return _variant(name, setting, model, _from_pixels(setting, model), places=places)


def adapted(setting: Setting, recipe: Recipe) -> AdaptedModel:
    """The backbone with a recipe attached, ready to train."""
    model = attach(setting.backbone, recipe, CLASSES, selected=setting.selected).to(setting.device)
    model.compute_in(_dtype(setting))
    return model.train()


def input_gradients(name: str, setting: Setting) -> Variant:
    """What no method that trains the first layer can be faster than: the forward pass, and
    gradients of activations alone.
    """
    model = adapted(setting, Recipe(head=HEAD))
    pixels = (setting.images.float() / 255).requires_grad_()
    return _variant(name, setting, model, lambda images: model(pixels))


def ours(name: str, setting: Setting, recipe: Recipe, is_compiled: bool = False) -> Variant:
    """A recipe of taskpack's, with the balance term where it has a bank. What writes its values
    into the weights is never compiled.
    """
    model = adapted(setting, recipe)
    if is_compiled:
        vars(model)["_hand_out"] = torch.compiler.disable(model._hand_out)
    forward: Any = torch.compile(model) if is_compiled else model
    places = sum(
        buffer.nbytes
        for layer in model.modules()
        if isinstance(layer, TunedLayer | WrittenWeights)
        for buffer in layer.buffers(recurse=False)
    )
    return _variant(
        name,
        setting,
        model,
        forward,
        places=places,
        auxiliary_loss=model.auxiliary_loss if recipe.smoa else None,
    )
