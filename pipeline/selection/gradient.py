"""The importance of every weight: the signed gradient of a loss on two augmented views, summed over
the training set.

    sum[o, i] = sum_batches dL/dW[o, i]

Each layer's gradient is added to its sum and freed as soon as the backward pass has computed it, so
only one layer's gradient is in memory at a time. Sums are kept in float64, on the device that
computes them, so that the order in which workers' sums are added does not decide between two nearly
equal connections. Augmentation is seeded by the batch, not by the worker that reads it.

If the activations of a batch would take too much memory, the batch is split into pieces (as in
GradCache, arXiv 2101.06983): first all features without a graph, then the loss's gradient with
respect to them, then each piece again with its part of that gradient. In evaluation mode samples
are independent, so the sum is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from pipeline.adaptation.sites import tunable_layers
from pipeline.adaptation.watched import learnt_once
from pipeline.adaptation.working import fuse_attention, slow_fused_attention
from pipeline.backbones import LoadedBackbone
from pipeline.data import numbered_generator
from pipeline.selection.losses import Loss
from pipeline.specs import Selection
from pipeline.utils.devices import autocast, computing_dtype, exact_float32, to_device

SAVED_BYTES = {"cpu": 2 << 30}
"""Most bytes of activations of one forward pass, by device; elsewhere four times as much."""

NumberedBatch = tuple[
    int, torch.Tensor, torch.Tensor
]  # its number, decoded samples [B, ...], targets [B, ...]


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
    of_features = loss(model)
    dtype = computing_dtype(spec.precision, device)
    fuse_attention(slow_fused_attention(model, dtype), False)
    sums = _collect_gradients(model)
    piece = max(1, SAVED_BYTES.get(device, 4 * SAVED_BYTES["cpu"]) // max(1, saved_bytes(backbone)))
    normalise = backbone.takes.normaliser().to(device)

    def features_of(views: torch.Tensor) -> torch.Tensor:
        with autocast(views.device, dtype):
            features: torch.Tensor = model(normalise(views))
        return features.float()

    for index, images, targets in batches:
        generator = numbered_generator(seed, index)
        views, both = backbone.takes.two_views(
            to_device(images, device), to_device(targets, device), generator, flip, spec.views
        )
        _backward(features_of, views, lambda features: of_features(features, both), piece)  # noqa: B023 - called at once
    return sums


def _backward(
    features_of: Callable[[torch.Tensor], torch.Tensor],
    views: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
    piece: int,
) -> None:
    """The backward pass of a batch, with a graph of at most `piece` views at a time."""
    if len(views) <= piece:
        loss(features_of(views)).backward()
        return
    pieces = views.split(piece)
    with torch.no_grad():
        features = torch.cat([features_of(each) for each in pieces])
    loss(features.requires_grad_()).backward()
    assert features.grad is not None
    for each, gradient in zip(pieces, features.grad.split(piece), strict=True):
        features_of(each).backward(gradient)


@learnt_once
def saved_bytes(backbone: LoadedBackbone) -> int:
    """Bytes that one image's forward pass saves for the backward pass, in float32."""
    model = backbone.fresh_model()
    _collect_gradients(model)
    frozen = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    image = torch.zeros(1, *backbone.takes.shape, device=device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model(image)
    del features
    return sum(kept.values())


def _collect_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Make every backward pass through `model` add its weights' gradients to the returned sums and
    free them.
    """
    sums = {}
    for name, layer in tunable_layers(model).items():
        layer.weight = torch.nn.Parameter(layer.weight.detach())  # same storage, own gradient
        sums[name] = torch.zeros(
            layer.weight.shape[0],
            layer.weight[0].numel(),
            dtype=torch.float64,
            device=layer.weight.device,
        )
        layer.weight.register_post_accumulate_grad_hook(_fold_into(sums[name]))
    return sums


def _fold_into(sum_OI: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def fold(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        sum_OI.add_(weight.grad.reshape(sum_OI.shape))
        weight.grad = None

    return fold
