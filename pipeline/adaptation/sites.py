"""Where parts can attach: layers and norms found by module type, never by a model's name."""

from __future__ import annotations

import torch
from timm.layers import RmsNorm, RmsNorm2d
from torch import nn
from torch.nn import functional as F

TunableLayer = nn.Linear | nn.Conv2d
_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    RmsNorm,
    RmsNorm2d,
)


def tunable_layers(model: nn.Module) -> dict[str, TunableLayer]:
    """Every Linear and Conv2d of a backbone, by name, in order of definition.

    Conv1d is left out: point transformers have their 1x1 convolutions as linear layers.
    Subclasses are left out: they standardise their weight, or pad according to the input's size,
    which a plain layer on another weight would not do. So are convolutions with padding "same" or
    a padding mode other than zeros.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear or _is_plain_convolution(module)
    }  # type: ignore[misc]


def _is_plain_convolution(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and not isinstance(module.padding, str)
        and module.padding_mode == "zeros"
    )


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every norm of a backbone that has a weight, by name."""
    return {name: module for name, module in model.named_modules() if is_norm(module)}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm that has a weight."""
    return isinstance(module, _NORMS) and module.weight is not None


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Neurons and inputs of a neuron, (O, I), of every tunable layer."""
    return {
        name: (layer.weight.shape[0], layer.weight[0].numel())
        for name, layer in tunable_layers(model).items()
    }


def weight_reader(model: nn.Module) -> str | None:
    """The first module that uses a layer's weight without calling the layer (the attention of BEiT
    and SwinV2), None where there is none.
    """
    return next(
        (
            name
            for name, module in model.named_modules()
            if isinstance(getattr(module, "q_bias", None), nn.Parameter)
        ),
        None,
    )


def apply_layer(
    layer: TunableLayer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply the plain dense layer with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
