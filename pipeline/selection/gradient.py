"""The importance of every weight: the signed gradient of a loss on two augmented views, summed over the training set.

    sum[o, i] = sum_batches dL/dW[o, i]

Each layer's gradient is added to its sum and let go as soon as the backward pass has made it, so one layer's gradient is alive at a time, never the
network's. Sums are kept in float64, on the device that computes them, so that the order in which workers' shares are added does not decide between
two nearly equal connections. (In float32 it did not for the embedded backbone and 800 images, but nothing would promise it.) Augmentation is seeded
by the batch, not by the worker that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from pipeline.adaptation.sites import tunable_layers
from pipeline.adaptation.working import fuse_attention, slow_fused_attention
from pipeline.backbones import LoadedBackbone
from pipeline.data import numbered_generator, two_views
from pipeline.selection.losses import Loss
from pipeline.specs import Selection
from pipeline.utils.devices import computing_dtype, exact_float32

NumberedBatch = tuple[int, torch.Tensor, torch.Tensor]  # its number, images uint8 [B, 3, S, S], labels int64 [B]


@exact_float32()
def gradient_sums(
    backbone: LoadedBackbone,
    batches: Iterable[NumberedBatch],
    spec: Selection,
    loss: Loss,
    *,
    seed: int,
    flip: bool,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Sum the gradients of numbered batches, computed on `device`.

    Returns:
        For each Linear and Conv2d, float64 [O, I] on `device`: neurons by input connections.
    """
    model = backbone.fresh_model().to(device)
    dtype = computing_dtype(spec.precision, device)
    fuse_attention(slow_fused_attention(model, dtype), False)
    sums = _collect_gradients(model)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    for index, images, labels in batches:
        views = two_views(images.to(device), numbered_generator(seed, index), flip, spec.views)
        with torch.autocast(views.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            features = model((views - mean) / std)
        loss(features.float(), labels.repeat(2).to(device)).backward()
    return sums


def _collect_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Make every backward pass through `model` add its weights' gradients to the sums returned, and keep none."""
    sums = {}
    for name, layer in tunable_layers(model).items():
        layer.weight = torch.nn.Parameter(layer.weight.detach())  # same storage, own gradient
        sums[name] = torch.zeros(layer.weight.shape[0], layer.weight[0].numel(), dtype=torch.float64, device=layer.weight.device)
        layer.weight.register_post_accumulate_grad_hook(_fold_into(sums[name]))
    return sums


def _fold_into(sum_OI: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def fold(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        sum_OI.add_(weight.grad.reshape(sum_OI.shape))
        weight.grad = None

    return fold
