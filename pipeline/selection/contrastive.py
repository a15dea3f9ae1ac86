"""Supervised contrastive loss over two views of each image (Khosla et al., arXiv 2004.11362,
equation 2).

For an anchor i with positives P(i) (other views that the task's kind considers alike):
    L_i = -1/|P(i)| * sum_{p in P(i)} log( exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t) )
z are L2-normalised pooled features; there is no head and no projector (GPS, arXiv 2312.10136).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from pipeline.kinds import kind_named

Positives = Callable[[torch.Tensor], torch.Tensor]
"""Function of targets [N, ...] that returns the positive pairs, bool [N, N]."""
_same_class: Positives = kind_named("classification").positives


def supervised_contrastive_loss(
    features_ND: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float,
    positives: Positives = _same_class,
) -> torch.Tensor:
    """Mean loss over all anchors. N counts views: with two views of each image every anchor has a
    positive.
    """
    z_ND = F.normalize(features_ND, dim=1)
    itself_NN = torch.eye(len(z_ND), dtype=torch.bool, device=z_ND.device)
    similarity_NN = (z_ND @ z_ND.T / temperature).masked_fill(itself_NN, -torch.inf)
    log_probability_NN = similarity_NN - similarity_NN.logsumexp(dim=1, keepdim=True)
    positive_NN = positives(targets_N) & ~itself_NN
    per_anchor_N = log_probability_NN.masked_fill(~positive_NN, 0).sum(dim=1) / positive_NN.sum(
        dim=1
    )
    return -per_anchor_N.mean()
