"""Low-precision copies of the frozen tensors, made once and used only while the model trains.

Under autocast, a frozen weight would be cast in every step, and one float32 position embedding or
norm keeps the whole residual stream in float32. Frozen tensors need no float32 master copy, so they
are cast once and the stream stays in low precision. Evaluation uses the backbone's own numbers.
Tensors that trained changes are added to stay as they are: the sum is rounded, not its terms.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def slow_fused_attention(model: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    """Modules whose fused attention is slower than its parts while `model` trains in `dtype`.

    On a CPU, the backward pass of torch's fused kernel takes several times as long in bfloat16 as
    that of its parts.
    """
    is_slow = dtype is torch.bfloat16 and next(model.parameters()).device.type == "cpu"
    return [
        module for module in model.modules() if is_slow and getattr(module, "fused_attn", False)
    ]


def fuse_attention(modules: Iterable[nn.Module], is_fused: bool) -> None:
    """Switch between torch's fused kernel and its separate operations."""
    for module in modules:
        setattr(module, "fused_attn", is_fused)  # noqa: B010 - an attribute of timm's, unknown to nn.Module's type


def norms_in_float32(model: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    """timm's layer norms, if autocast computes them in float32 while `model` trains in `dtype`.

    A GPU's autocast does, a CPU's does not. Each would be cast up, and its output cast down again
    by the layer that reads it.
    """
    is_cast = dtype is torch.bfloat16 and next(model.parameters()).device.type != "cpu"
    norms = [module for module in model.modules() if not getattr(module, "_fast_norm", True)]
    return norms if is_cast else []


class WorkingCopies:
    """Switches a frozen network between its own parameters and copies in `dtype`, its attention
    between the fused kernel and separate operations, and its norms between float32 and `dtype`.

    Args:
        model: its parameters are its own; their storage may be shared with other models and is
            never written to.
        kept: parameters to leave alone.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, kept: Iterable[nn.Parameter]) -> None:
        left_alone = {id(parameter) for parameter in kept}
        # Running statistics stay float32, and batch norm wants its parameters alike.
        left_alone |= {
            id(parameter)
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            for parameter in module.parameters()
        }
        cast = [
            parameter
            for parameter in model.parameters()
            if id(parameter) not in left_alone and parameter.dtype != dtype
        ]
        self._copies = [(parameter, parameter.data, parameter.data.to(dtype)) for parameter in cast]
        self._fused, self._norms = (
            slow_fused_attention(model, dtype),
            norms_in_float32(model, dtype),
        )

    def use(self, mode: bool) -> None:
        """Use the copies (`mode` true) or the frozen tensors."""
        for parameter, frozen, copy in self._copies:
            parameter.data = copy if mode else frozen
        fuse_attention(self._fused, not mode)
        for norm in self._norms:
            setattr(norm, "_fast_norm", mode)  # noqa: B010 - as above
