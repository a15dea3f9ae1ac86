"""The losses whose gradients rank connections (the ablation of GPS, arXiv 2312.10136).

contrastive      of the two views' features, without a head (see contrastive.py)
cross_entropy    the loss of the task's kind (multi-label: binary cross-entropy) of a linear
                 classifier on the features of both views, whose weights are random and not
                 trained and whose bias is zero
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from pipeline.adaptation.tensors import PlannedTensor, initial_values
from pipeline.kinds import TaskKind
from pipeline.selection.contrastive import supervised_contrastive_loss
from pipeline.specs import Selection

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Function of features [N, D] and targets [N, ...] that returns a scalar."""


def make_loss(spec: Selection, kind: TaskKind, width: int, class_count: int, seed: int) -> Loss:
    """The loss that `spec` names, for features of `width` numbers."""
    if spec.loss == "contrastive":
        return functools.partial(
            supervised_contrastive_loss, temperature=spec.temperature, positives=kind.positives
        )
    head_CD = initial_values(
        PlannedTensor("head", "head.weight", (class_count, width), 32, start="head"),
        torch.Generator().manual_seed(seed),
    )
    return lambda features_ND, targets_N: kind.loss(
        features_ND @ head_CD.to(features_ND.device).T, targets_N
    )
