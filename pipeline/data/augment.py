"""Augmentation of a whole batch at once: random crop, flip, brightness and contrast.

Crop and flip are one affine map of the sampling grid, x' = s_x x + t_x and y' = s_y y + t_y, with a negative s_x where the image is mirrored, so the
batch is resampled once. Crops cover 50-100 % of the area at an aspect of 3/4 to 4/3. The two views are those of the supervised contrastive loss
(arXiv 2004.11362). All random numbers come from the generator, drawn on its device; callers use one on the CPU, so a seed draws the same numbers
wherever the images are.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

CROP_AREA = (0.5, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
JITTER = 0.4


def two_views(images: torch.Tensor, generator: torch.Generator, flip: bool) -> torch.Tensor:
    """Two augmented views of each image: `images` as in `augment` [B, 3, S, S] to float32 [2B, 3, S, S], first views before second views."""
    return augment(torch.cat([images, images]), generator, flip)


def augment(images: torch.Tensor, generator: torch.Generator, flip: bool) -> torch.Tensor:
    """A random variant of each image: `images` uint8, or float in [0, 1], [B, 3, S, S] to float32 in [0, 1], same shape; `flip` allows mirroring."""
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    area, aspect, x, y, mirror, brightness, contrast = torch.rand(7, len(images), generator=generator, device=generator.device).to(images.device)
    grid = functional.affine_grid(_crop(area, aspect, x, y, mirror if flip else torch.zeros_like(mirror)), list(pixels.shape), align_corners=False)
    crops = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _jitter(crops, brightness, contrast)


def _crop(area: torch.Tensor, aspect: torch.Tensor, x: torch.Tensor, y: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """Affine maps [B, 2, 3] from numbers in [0, 1), each [B]. Width and height are fractions of the image's; the crop never leaves the image."""
    scale = CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0])
    ratio = torch.exp(math.log(CROP_ASPECT[0]) + aspect * math.log(CROP_ASPECT[1] / CROP_ASPECT[0]))
    width, height = (scale * ratio).sqrt().clamp(max=1), (scale / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(len(area), 2, 3, device=area.device)
    theta[:, 0, 0] = torch.where(mirror < 0.5, width, -width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * x - 1)
    theta[:, 1, 2] = (1 - height) * (2 * y - 1)
    return theta


def _jitter(images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """Scale contrast about each image's mean, then brightness, each by a factor in 1 ± JITTER; [B, 3, S, S]."""
    factor_brightness, factor_contrast = ((1 + JITTER * (2 * number - 1)).view(-1, 1, 1, 1) for number in (brightness, contrast))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (((images - mean) * factor_contrast + mean) * factor_brightness).clamp(0, 1)
