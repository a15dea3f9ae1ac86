"""Find which dimension of a layer's output holds its channels, in one forward pass.

Usually only one dimension is as long as the layer has channels. If several are, one channel's
weight is changed, and the outputs that change show the channel's dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from pipeline.adaptation.sites import norms_of, tunable_layers
from pipeline.adaptation.watched import learnt_once, watch
from pipeline.backbones import LoadedBackbone


@learnt_once
def channel_dims(backbone: LoadedBackbone) -> Mapping[str, int]:
    """For every layer and norm that is called: the dimension of its channels, counted from the
    last, which is -1.
    """
    dims: dict[str, int] = {}
    unclear: dict[str, torch.Tensor] = {}

    def record(
        name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        found = _as_long_as(output, len(module.weight))  # type: ignore[arg-type]
        if len(found) == 1:
            dims.setdefault(name, found[0])
        else:
            unclear.setdefault(name, inputs[0].clone())

    def place_hooks(model: nn.Module) -> None:
        for name, module in {**tunable_layers(model), **norms_of(model)}.items():
            module.register_forward_hook(partial(record, name))

    watch(backbone, place_hooks)
    return {
        **dims,
        **{
            name: _changed_dim(backbone.model.get_submodule(name), x)
            for name, x in unclear.items()
            if name not in dims
        },
    }


def _as_long_as(output: torch.Tensor, channels: int) -> list[int]:
    return [dim for dim in range(-output.ndim, 0) if output.shape[dim] == channels]


@torch.no_grad()
def _changed_dim(module: nn.Module, x: torch.Tensor) -> int:
    """The dimension along which the output changes with the weight of one channel; tries further
    channels until one has an effect.
    """
    weight, output = module.weight, module(x)
    assert isinstance(weight, torch.Tensor)
    for channel in range(len(weight)):
        changed = weight.clone()
        changed[channel] += 1
        indices = (
            torch.func.functional_call(module, {"weight": changed}, (x,)) != output
        ).nonzero()
        found = [
            dim
            for dim in _as_long_as(output, len(weight))
            if len(indices) and bool((indices[:, dim] == channel).all())
        ]
        if len(found) == 1:
            return found[0]
    return -1
