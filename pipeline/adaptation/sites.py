"""Where parts can attach: layers and blocks found by module type and by their children, never by a model's name."""

from __future__ import annotations

from dataclasses import dataclass

from timm.layers import LayerNorm2d, RmsNorm
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from pipeline.adaptation.connections import TunableLayer

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, RmsNorm)
_POST_NORM_BLOCKS = (ResPostBlock, SwinTransformerV2Block)


@dataclass(frozen=True)
class MlpSlot:
    """A block with an MLP next to a norm. Children are named relative to the block; None where the block has no such child.

    stream: its input is the residual stream that the MLP's branch is added to. mlp_end, attention_end: its output is what is added to the stream,
    after LayerScale where there is one. The stream and these ends have channels first where `stream_channels_first`, the MLP where `channels_first`.
    """

    block: str
    norm: str
    width: int
    channels_first: bool
    stream: str
    stream_channels_first: bool
    mlp_end: str | None
    attention_end: str | None


def tunable_layers(model: nn.Module) -> dict[str, TunableLayer]:
    """Every Linear and Conv2d of a backbone, by name, in order of definition.

    Subclasses are left alone: they standardise their weight, or pad by the input's size, which a plain layer on another weight would not do. So are
    convolutions that pad by a rule ("same") or with anything but zeros.
    """
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear or _is_plain_convolution(module)}  # type: ignore[misc]


def _is_plain_convolution(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and not isinstance(module.padding, str) and module.padding_mode == "zeros"


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every norm of a backbone that has a weight, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _NORMS) and module.weight is not None}


def has_channels_first(module: nn.Module) -> bool:
    """Whether a layer or norm puts channels at dimension 1 of its output, not last."""
    return isinstance(module, nn.Conv2d | nn.GroupNorm | LayerNorm2d | nn.modules.batchnorm._BatchNorm)


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Neurons and inputs of a neuron, (O, I), of every tunable layer."""
    return {name: (layer.weight.shape[0], layer.weight[0].numel()) for name, layer in tunable_layers(model).items()}


def weight_reader(model: nn.Module) -> str | None:
    """The first module that uses a layer's weight without calling the layer (the attention of BEiT and SwinV2), None where there is none."""
    return next((name for name, module in model.named_modules() if isinstance(getattr(module, "q_bias", None), nn.Parameter)), None)


def mlp_slots(model: nn.Module) -> list[MlpSlot]:
    """Every block with an `mlp` and a norm next to it: before it (ViT, Swin, ConvNeXt) or, in post-norm blocks (SwinV2), after it."""
    slots = []
    for name, block in model.named_modules():
        first = getattr(getattr(block, "mlp", None), "fc1", None)
        norm = _child(block, "norm2", "norm")
        if isinstance(first, nn.Linear | nn.Conv2d) and norm is not None:
            slots.append(_slot(name, block, norm, first))
    return slots


def _slot(name: str, block: nn.Module, norm: str, first: nn.Linear | nn.Conv2d) -> MlpSlot:
    channels_first = isinstance(first, nn.Conv2d)
    # ConvNeXt's branch begins with its depthwise convolution; where the norm comes last, the MLP reads the stream itself.
    stream = "conv_dw" if _child(block, "conv_dw") else "mlp" if isinstance(block, _POST_NORM_BLOCKS) else norm
    return MlpSlot(
        block=name,
        norm=norm,
        width=int(first.weight.shape[1]),
        channels_first=channels_first,
        stream=stream,
        stream_channels_first=channels_first or stream == "conv_dw",
        mlp_end=_child(block, "drop_path2", "drop_path"),
        attention_end=_child(block, "drop_path1") if _child(block, "attn") else None,
    )


def _child(block: nn.Module, *names: str) -> str | None:
    return next((name for name in names if isinstance(getattr(block, name, None), nn.Module)), None)
