"""Pixels of predicted and true masks, counted by class: all that the metrics of masks need.

A boundary band is the pixels of a class that are at most BAND_PX from a pixel of another class or
from outside the image, as in boundary IoU (arXiv 2103.16562), with a fixed width. Ignored pixels
are counted nowhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pipeline.kinds.protocol import IGNORED

BAND_PX = 2
HITS, PREDICTED, BAND_HITS, BAND_PREDICTED = range(4)
"""Columns of the outputs: pixels of a class in both masks, in the predicted one, and the same of
their boundary bands."""
ACTUAL, BAND_ACTUAL = range(2)
"""Columns of the targets: pixels of a class in the true mask, and of its boundary band."""


def count_masks(
    predicted: torch.Tensor, targets: torch.Tensor, class_count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of predicted masks, int [B, S, S], and of true ones: int32 [B, C, 4] and [B, C, 2]."""
    is_counted = targets != IGNORED
    predicted = predicted.where(is_counted, torch.full_like(predicted, IGNORED))
    outputs = torch.zeros(len(targets), class_count, 4, dtype=torch.int32)
    actual = torch.zeros(len(targets), class_count, 2, dtype=torch.int32)
    for number in range(class_count):
        found, wanted = predicted == number, targets == number
        found_band, wanted_band = boundary_band(found), boundary_band(wanted)
        outputs[:, number] = _pixels(found & wanted, found, found_band & wanted_band, found_band)
        actual[:, number] = _pixels(wanted, wanted_band)
    return outputs, actual


def _pixels(*masks_BSS: torch.Tensor) -> torch.Tensor:
    """The pixels of several masks, [B, masks]."""
    return torch.stack([each.sum(dim=(1, 2)) for each in masks_BSS], dim=1)


def boundary_band(masks: torch.Tensor) -> torch.Tensor:
    """The boundary bands of bool masks [B, S, S], in the same shape."""
    if not masks.any():
        return masks
    outside = F.pad((~masks).float()[:, None], (BAND_PX,) * 4, value=1.0)
    near_outside = F.max_pool2d(outside, 2 * BAND_PX + 1, stride=1)[:, 0] > 0
    return masks & near_outside
