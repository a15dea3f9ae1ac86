"""Semantic segmentation: each pixel has exactly one class, or is ignored.

    cross_entropy_dice    mean over images of (cross-entropy + 1 - soft Dice); the default
    bce_iou               mean over images of (binary cross-entropy + 1 - soft IoU)

An image's cross-entropy is the mean over its pixels, its soft Dice (V-Net, arXiv 1606.04797) or IoU
the mean over the classes that occur in its mask. The second loss, that of GPS's recipe for SAM
(arXiv 2312.10136), asks of each class on its own whether a pixel belongs to it, by a sigmoid. Terms
are weighted equally. All are means over images, so a batch's loss does not depend on how samples
are batched. Pixels of the value 255 count in none.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.kinds.mask_counts import count_masks
from pipeline.kinds.protocol import Annotations, Label
from pipeline.kinds.registry import register_kind


@register_kind
class Segmentation:
    """A class for every pixel: uint8 masks [B, S, S], cross-entropy and soft Dice, argmax."""

    name = "segmentation"
    default_metric = "mIoU"
    several_labels = True
    is_dense = True
    losses: tuple[str, ...] = ("cross_entropy_dice", "bce_iou")
    selection_losses: tuple[str, ...] = ("cross_entropy",)
    columns: tuple[tuple[str, Any], ...] = (("areas", dict[str, float]), ("mask", bytes))

    def label(self, classes: Sequence[int]) -> Label:
        """The classes that occur in a mask."""
        label = tuple(sorted(set(classes)))
        if len(label) < len(classes):
            raise ValueError("a class is given twice; give each class of a mask once")
        return label

    def targets(self, annotations: Annotations, class_count: int) -> torch.Tensor:
        assert isinstance(annotations, torch.Tensor), "masks are read with their images"
        return annotations

    def soft_targets(self, targets: torch.Tensor, class_count: int) -> torch.Tensor:
        """One-hot [B, C, S, S]; nothing at pixels that are ignored."""
        one_hot = F.one_hot(targets.long().clamp(max=class_count), class_count + 1)
        return one_hot[..., :class_count].movedim(-1, 1).float()

    def loss(
        self,
        outputs: torch.Tensor,
        targets: torch.Tensor,
        label_smoothing: float = 0.0,
        name: str | None = None,
    ) -> torch.Tensor:
        is_soft = targets.is_floating_point()
        soft = targets if is_soft else self.soft_targets(targets, outputs.shape[1])
        own_loss = _bce_iou if name == "bce_iou" else _cross_entropy_dice
        return own_loss(outputs, soft, label_smoothing).mean()

    def positives(self, targets: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("segmentation has no contrastive loss")

    def kept(
        self, outputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels counted by class: see `count_masks`."""
        return count_masks(outputs.argmax(dim=1), targets, outputs.shape[1])

    def predictions(self, outputs: torch.Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
        """`areas`, the fraction of pixels of each class, and `mask`, class numbers as a PNG."""
        rows = []
        for mask in outputs:
            pixels = torch.bincount(mask.flatten(), minlength=len(classes)).tolist()
            shares = [count / mask.numel() for count in pixels]
            areas = dict(zip(classes, shares, strict=True))
            rows.append({"areas": areas, "mask": _as_png(mask)})
        return rows


def _cross_entropy_dice(
    outputs: torch.Tensor, soft: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """The loss of each image, [B]."""
    counted = soft.sum(dim=1, keepdim=True)
    log_probabilities = outputs.log_softmax(dim=1)
    smoothed = (1 - label_smoothing) * soft + counted * label_smoothing / outputs.shape[1]
    entropy_B = -(smoothed * log_probabilities).sum(dim=(1, 2, 3))
    entropy_B = entropy_B / counted.sum(dim=(1, 2, 3)).clamp(min=1)
    return entropy_B + 1 - _soft_dice(log_probabilities.exp() * counted, soft)


def _bce_iou(outputs: torch.Tensor, soft: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """The loss of each image, [B]."""
    counted = soft.sum(dim=1, keepdim=True)
    smoothed = (1 - label_smoothing) * soft + counted * label_smoothing / 2
    entropies = F.binary_cross_entropy_with_logits(outputs, smoothed, reduction="none") * counted
    pixels_B = counted.sum(dim=(1, 2, 3)).clamp(min=1) * outputs.shape[1]
    dice_BC, occurs_BC = _dice_of_classes(outputs.sigmoid() * counted, soft)
    iou_B = _mean_of_occurring(dice_BC / (2 - dice_BC), occurs_BC)
    return entropies.sum(dim=(1, 2, 3)) / pixels_B + 1 - iou_B


def _soft_dice(probabilities: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """2 |P T| / (|P| + |T|) of each image [B], a mean over the classes that occur in it."""
    return _mean_of_occurring(*_dice_of_classes(probabilities, soft))


def _dice_of_classes(
    probabilities: torch.Tensor, soft: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft Dice of each image and class, and whether the class occurs: float [B, C] both."""
    overlap_BC = (probabilities * soft).sum(dim=(2, 3))
    total_BC = (probabilities + soft).sum(dim=(2, 3))
    occurs_BC = (soft.amax(dim=(2, 3)) > 0).float()
    return 2 * overlap_BC / total_BC.clamp(min=1e-6), occurs_BC


def _mean_of_occurring(values_BC: torch.Tensor, occurs_BC: torch.Tensor) -> torch.Tensor:
    return (values_BC * occurs_BC).sum(dim=1) / occurs_BC.sum(dim=1).clamp(min=1)


def _as_png(mask: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(mask.numpy()).save(stream, format="PNG")
    return stream.getvalue()
