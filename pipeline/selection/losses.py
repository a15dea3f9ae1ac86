"""The losses whose gradients rank connections (the ablation of GPS, arXiv 2312.10136).

contrastive      of the two views' features, without a head (see contrastive.py)
cross_entropy    the loss of the task's kind (multi-label: binary cross-entropy) of a linear
                 classifier on the features of both views, whose weights are random and not
                 trained and whose bias is zero; of segmentation, on the feature of each place, or
                 of a mask decoder's class tokens
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from pipeline.adaptation.map_head import make_head
from pipeline.adaptation.tensors import PlannedTensor, initial_values
from pipeline.backbones import LoadedBackbone
from pipeline.kinds import TaskKind
from pipeline.selection.contrastive import supervised_contrastive_loss
from pipeline.specs import Head, Selection

OfFeatures = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Function of features [N, D] or [N, D, h, w] and targets [N, ...] that returns a scalar."""
Loss = Callable[[nn.Module], OfFeatures]
"""The loss of a fresh model of the backbone; it gives a mask decoder in it class tokens."""


def make_loss(
    spec: Selection, kind: TaskKind, backbone: LoadedBackbone, class_count: int, seed: int
) -> Loss:
    """The loss that `spec` names, for models of the backbone."""
    if spec.loss == "contrastive":
        contrastive = functools.partial(
            supervised_contrastive_loss, temperature=spec.temperature, positives=kind.positives
        )
        return lambda model: contrastive
    weight = PlannedTensor("head", "head.weight", (class_count, backbone.width), 32, start="head")
    weight_CD = initial_values(weight, torch.Generator().manual_seed(seed))

    def of_head(model: nn.Module) -> OfFeatures:
        head = make_head(backbone, model, Head())
        head.current["weight"] = weight_CD.to(next(model.parameters()).device)
        return lambda features, targets: kind.loss(head(features), targets)

    return of_head
