"""Mixup and CutMix: each image is mixed with its mirror in the batch's order, and so are their
labels.

    mixup    (arXiv 1710.09412)  x = l x + (1 - l) x',  l ~ Beta(a, a)
    cutmix   (arXiv 1905.04899)  a box of x' covers 1 - l of x; l is corrected for boxes cut by the
    border

One l is drawn per batch, and where both are on, one of them with equal probability, as timm's Mixup
does by default.
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.specs import Training


def mix(
    images: torch.Tensor, targets: torch.Tensor, spec: Training, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed images, float32 [B, 3, S, S] in [0, 1], and their soft targets, float32 [B, ...].

    Soft masks [B, C, S, S] are mixed, or cut, as their images are.
    """
    draws = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    other = pixels.flip(0)
    is_cutmix = spec.cutmix > 0 and (spec.mixup == 0 or draws.random() < 0.5)
    alpha = spec.cutmix if is_cutmix else spec.mixup
    share = float(draws.beta(alpha, alpha))
    if is_cutmix:
        top, bottom, left, right = _box(share, pixels.shape[-2], pixels.shape[-1], draws)
        pixels = pixels.clone()
        pixels[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        if targets.ndim == pixels.ndim:
            cut = targets.clone()
            cut[..., top:bottom, left:right] = targets.flip(0)[..., top:bottom, left:right]
            return pixels, cut
        share = 1 - (bottom - top) * (right - left) / (pixels.shape[-2] * pixels.shape[-1])
    else:
        pixels = other.lerp(pixels, share)
    return pixels, targets.flip(0).lerp(targets, share)


def _box(
    share: float, height: int, width: int, draws: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box of 1 - `share` of the image about a random centre, cut
    off at the border.
    """
    side = np.sqrt(1 - share)
    cut_height, cut_width = int(height * side), int(width * side)
    y, x = int(draws.integers(height)), int(draws.integers(width))
    rows = np.clip([y - cut_height // 2, y + cut_height // 2], 0, height)
    columns = np.clip([x - cut_width // 2, x + cut_width // 2], 0, width)
    return int(rows[0]), int(rows[1]), int(columns[0]), int(columns[1])
