"""What a pack of a dense kind says of an image: a class for each pixel of the image's own size.

Each image passes through the network alone. So its mask and the memory it takes do not depend on
the other images of a request.

Legend: C classes, S the side of the network's input, H and W those of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from pipeline.adaptation import AdaptedModel
from pipeline.kinds import TaskKind
from pipeline.serving.samples import Decoded
from pipeline.utils.devices import exact_float32


@exact_float32()
@torch.inference_mode()
def dense_logits(model: AdaptedModel, sample: Decoded) -> torch.Tensor:
    """The logits [C, S, S] of one image, on the CPU."""
    logits: torch.Tensor = model(torch.from_numpy(sample.array)[None].to(model.device))
    return logits[0].cpu()


def mask_answer(
    kind: TaskKind, classes: Sequence[str], logits_CSS: torch.Tensor, sample: Decoded
) -> dict[str, Any]:
    """The prediction of a dense kind for one image."""
    return kind.predictions(class_mask(logits_CSS, sample.size)[None], classes)[0]


@torch.inference_mode()
def class_mask(logits_CSS: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The most probable class of each pixel, uint8 [H, W], of logits that are interpolated to
    `size` as the evaluation does: the first of equals.

    One class after another, which takes 10 bytes per pixel, however many classes there are.
    """
    largest_HW = _interpolated(logits_CSS[0], size)
    mask_HW = torch.zeros(size, dtype=torch.uint8)
    for number, logits_SS in enumerate(logits_CSS[1:], start=1):
        found_HW = _interpolated(logits_SS, size)
        mask_HW.masked_fill_(found_HW > largest_HW, number)
        torch.maximum(largest_HW, found_HW, out=largest_HW)
    return mask_HW


def _interpolated(logits_SS: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits of one class at the size of an image, [H, W]."""
    one = logits_SS.contiguous()[None, None]
    return functional.interpolate(one, size, mode="bilinear", align_corners=False)[0, 0]
