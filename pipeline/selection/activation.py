"""The mean size of every input of every layer, from forward passes alone (FPS, arXiv 2510.27359).

    importance[o, i] = |W[o, i]| * mean_images mean_t |x[t, i]|

t runs over the tokens or output pixels of an image. Images are read as they are, without
augmentation. A convolution's input i is a channel at a place of the kernel, as its output pixels
see it: padding counts as zero. There is no backward pass, so memory is that of inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional

from pipeline.adaptation.parts.connections import TunableLayer
from pipeline.adaptation.sites import tunable_layers
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError
from pipeline.selection.gradient import NumberedBatch
from pipeline.specs import Selection
from pipeline.utils.devices import autocast, computing_dtype, exact_float32, to_device


@exact_float32()
@torch.inference_mode()
def activation_sums(
    backbone: LoadedBackbone,
    batches: Iterable[NumberedBatch],
    spec: Selection,
    *,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Sum the mean size of every layer's inputs over the images of numbered batches.

    Returns:
        For each Linear and Conv2d, float64 [G, I] on `device`: one row for each group of a
        convolution.

    Raises:
        BackboneError: a block uses a layer's weight without calling the layer, so its input is not
            seen.
    """
    model = backbone.fresh_model().to(device)
    means, dtype = _watch(model), computing_dtype(spec.precision, device)
    sums = {
        name: torch.zeros(
            _groups(layer), layer.weight[0].numel(), dtype=torch.float64, device=device
        )
        for name, layer in _layers(model)
    }
    normalise = backbone.takes.normaliser().to(device)
    for _, images, _ in batches:
        means.clear()
        with autocast(device, dtype):
            model(normalise(to_device(images, device)))
        _check_all_called(model, means)
        for name, mean_GI in means.items():
            sums[name] += len(images) * mean_GI
    return sums


def activation_importance(layer: TunableLayer, sum_GI: torch.Tensor) -> torch.Tensor:
    """|W| times the inputs' size, float64 [O, I]."""
    weight_OI = layer.weight.detach().flatten(1).to(sum_GI)
    return weight_OI.abs() * sum_GI.repeat_interleave(len(weight_OI) // len(sum_GI), dim=0)


def _layers(model: nn.Module) -> list[tuple[str, TunableLayer]]:
    return list(tunable_layers(model).items())


def _groups(layer: TunableLayer) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def _watch(model: nn.Module) -> dict[str, torch.Tensor]:
    """A mapping that each forward pass of `model` fills with every layer's mean input sizes, [G,
    I].
    """
    means: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def keep(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            means[name] = _mean_sizes(layer, inputs[0].float().abs())

        return keep

    for name, layer in _layers(model):
        layer.register_forward_pre_hook(watch(name))
    return means


def _mean_sizes(layer: nn.Module, sizes: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens, or all output pixels, of a layer's inputs; [G, I]."""
    if not isinstance(layer, nn.Conv2d):
        return sizes.reshape(-1, sizes.shape[-1]).mean(dim=0, keepdim=True)
    with torch.autocast(sizes.device.type, enabled=False):
        # A convolution's weight gradient, where its output's gradient is one: the sum over output
        # pixels. One output channel a group will do.
        weight = sizes.new_zeros(layer.groups, *layer.weight.shape[1:])
        ones = torch.ones_like(
            functional.conv2d(
                sizes, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
            )
        )
        total = nn.grad.conv2d_weight(
            sizes,
            list(weight.shape),
            ones,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
    return total.flatten(1) / ones[:, 0].numel()


def _check_all_called(model: nn.Module, means: Mapping[str, torch.Tensor]) -> None:
    silent = [name for name, _ in _layers(model) if name not in means]
    if silent:
        raise BackboneError(
            f"selection: criterion activation cannot see the inputs of {', '.join(silent)}:"
            f" {type(model).__name__} uses such a layer's weight without calling the layer; choose"
            " criterion gradient or magnitude"
        )
