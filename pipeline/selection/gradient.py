"""The importance of every weight: the signed gradient of the contrastive loss, summed over the training set.

Sums are kept in float64, so that they agree whatever the order in which workers' shares are added. Augmentation is seeded by the batch, not by the
worker that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from pipeline.adaptation.plan import tunable_layers
from pipeline.backbones import LoadedBackbone
from pipeline.data import Reader, two_views
from pipeline.selection.contrastive import supervised_contrastive_loss
from pipeline.spec import Selection

NumberedBatch = tuple[int, np.ndarray]


def gradient_sums(
    backbone: LoadedBackbone,
    reader: Reader,
    batches: Iterable[NumberedBatch],
    spec: Selection,
    *,
    seed: int,
    flip: bool,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Sum the gradients of numbered batches of samples [B, 2], computed on `device`.

    Returns:
        On the CPU, for each Linear and Conv2d, float64 [O, I]: neurons by input connections.
    """
    model = backbone.fresh_model().to(device)
    layers = tunable_layers(model)
    for layer in layers.values():
        layer.weight = torch.nn.Parameter(layer.weight.detach())  # same storage, own gradient
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    sums = {name: torch.zeros(layer.weight.shape[0], layer.weight[0].numel(), dtype=torch.float64) for name, layer in layers.items()}
    for index, samples in batches:
        images, labels = reader.read(samples)
        views = two_views(images, batch_generator(seed, index), flip=flip).to(device)
        loss = supervised_contrastive_loss(model((views - mean) / std), labels.repeat(2).to(device), spec.temperature)
        loss.backward()
        for name, layer in layers.items():
            assert layer.weight.grad is not None
            sums[name] += layer.weight.grad.reshape(sums[name].shape).cpu()
            layer.weight.grad = None
    return sums


def batch_generator(seed: int, index: int) -> torch.Generator:
    """A generator of its own for each batch."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1))
