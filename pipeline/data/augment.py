"""Augmentation of a whole batch at once, on the device of the images.

light    crop 50-100 % of the area, flip, brightness and contrast
crop     crop 8-100 % of the area, flip: timm's and torchvision's RandomResizedCrop
strong   `crop`, colour jitter (brightness, contrast and saturation 0.4, hue 0.1, in random order)
         with probability 0.8, grey with probability 0.2: the views of the supervised contrastive
         loss (arXiv 2004.11362) as GPS (arXiv 2312.10136) draws them

Crop and flip are one affine map of the sampling grid, x' = s_x x + t_x and y' = s_y y + t_y, with a
negative s_x where the image is mirrored, so the batch is resampled once. All random numbers are
drawn from the generator, on its device; callers use one on the CPU, so a seed draws the same
numbers wherever the images are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from pipeline.specs import Augmentation

CROP_ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10
"""Crops drawn until one lies inside the image, as in torchvision; if none does, the whole image is
used.
"""
JITTER = 0.4
HUE_JITTER = 0.1
COLOUR_PROBABILITY = 0.8
GREY_PROBABILITY = 0.2

_GREY = (0.2989, 0.587, 0.114)


def numbered_generator(seed: int, number: int) -> torch.Generator:
    """A generator for the batch or step with this number, whose random numbers depend on nothing
    that came before.
    """
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)
    )


def two_views(
    images: torch.Tensor, generator: torch.Generator, flip: bool, kind: Augmentation = "strong"
) -> torch.Tensor:
    """Two augmented views of each image: `images` as in `augment` [B, 3, S, S] to float32 [2B, 3,
    S, S], first views before second views.
    """
    return augment(torch.cat([images, images]), generator, flip, kind)


def augment(
    images: torch.Tensor, generator: torch.Generator, flip: bool, kind: Augmentation = "light"
) -> torch.Tensor:
    """A random variant of each image: `images` uint8, or float in [0, 1], [B, 3, S, S] to float32
    in [0, 1], same shape; `flip` allows mirroring.
    """
    return augment_with(images, images.new_empty(len(images)), generator, flip, kind)[0]


def augment_with(
    images: torch.Tensor,
    targets: torch.Tensor,
    generator: torch.Generator,
    flip: bool,
    kind: Augmentation,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`augment`, and the targets: masks, uint8 [B, S, S], are cropped and flipped with their
    images, by nearest neighbour; other targets are returned as they are.
    """
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    if kind == "none" or not len(pixels):
        return pixels, targets
    draw = _Numbers(generator, len(pixels), pixels.device)
    grid = functional.affine_grid(
        _crop(draw, 0.5 if kind == "light" else 0.08, flip), list(pixels.shape), align_corners=False
    )
    crops = functional.grid_sample(
        pixels, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    if targets.shape == images[:, 0].shape:
        targets = _moved_masks(targets, grid)
    if kind == "crop":
        return crops, targets
    jitter = _light_jitter if kind == "light" else _colour_jitter
    return jitter(crops, draw), targets


def _moved_masks(masks: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    moved = functional.grid_sample(
        masks[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False
    )
    return moved[:, 0].to(masks.dtype)


@dataclass(frozen=True)
class _Numbers:
    """Uniform random numbers in [0, 1), one per image and draw."""

    generator: torch.Generator
    images: int
    device: torch.device

    def __call__(self, *shape: int) -> torch.Tensor:
        """Numbers [*shape, B]."""
        return torch.rand(
            *shape, self.images, generator=self.generator, device=self.generator.device
        ).to(self.device)


def _crop(draw: _Numbers, smallest_area: float, flip: bool) -> torch.Tensor:
    """Affine maps [B, 2, 3]. Width and height are fractions of the image's; the crop never leaves
    the image.
    """
    area, aspect = draw(2, CROP_TRIES)
    scale = smallest_area + area * (1 - smallest_area)
    ratio = torch.exp(math.log(CROP_ASPECT[0]) + aspect * math.log(CROP_ASPECT[1] / CROP_ASPECT[0]))
    size_2TB = torch.stack([(scale * ratio).sqrt(), (scale / ratio).sqrt()])
    fits_TB = (size_2TB <= 1).all(dim=0)
    first_B = fits_TB.float().argmax(dim=0)
    width, height = torch.where(
        fits_TB.any(dim=0), size_2TB.gather(1, first_B.expand(2, 1, -1)).squeeze(1), 1.0
    )
    x, y, mirror = draw(3)
    theta = torch.zeros(draw.images, 2, 3, device=draw.device)
    theta[:, 0, 0] = torch.where((mirror < 0.5) | (not flip), width, -width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * x - 1)
    theta[:, 1, 2] = (1 - height) * (2 * y - 1)
    return theta


def _light_jitter(images: torch.Tensor, draw: _Numbers) -> torch.Tensor:
    """Scale contrast about each image's mean, then brightness; [B, 3, S, S]."""
    contrast, brightness = _factors(draw(2))
    return (
        _blend(images, images.mean(dim=(1, 2, 3), keepdim=True), contrast)
        * brightness.view(-1, 1, 1, 1)
    ).clamp(0, 1)


def _colour_jitter(images: torch.Tensor, draw: _Numbers) -> torch.Tensor:
    """torchvision's ColorJitter with a probability, then RandomGrayscale with a probability; the
    order of operations differs per image.
    """
    order_4B = draw(4).argsort(dim=0)
    (brightness, contrast, saturation), hue = _factors(draw(3)), HUE_JITTER * (2 * draw() - 1)
    is_jittered, is_grey = draw() < COLOUR_PROBABILITY, draw() < GREY_PROBABILITY
    changes: list[tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], torch.Tensor]] = [
        (lambda pixels, factor: _blend(pixels, torch.zeros_like(pixels), factor), brightness),
        (
            lambda pixels, factor: _blend(
                pixels, _grey(pixels).mean(dim=(1, 2, 3), keepdim=True), factor
            ),
            contrast,
        ),
        (lambda pixels, factor: _blend(pixels, _grey(pixels), factor), saturation),
        (turn_hue, hue),
    ]
    images = images.clone()
    for turn_B in order_4B:
        for number, (change, amount) in enumerate(changes):
            chosen = (is_jittered & (turn_B == number)).nonzero().squeeze(1)
            images[chosen] = change(images[chosen], amount[chosen])
    return torch.where(is_grey.view(-1, 1, 1, 1), _grey(images), images)


def _factors(numbers: torch.Tensor) -> torch.Tensor:
    return 1 + JITTER * (2 * numbers - 1)


def _blend(images: torch.Tensor, towards: torch.Tensor, factor_B: torch.Tensor) -> torch.Tensor:
    """Blend: `factor` of the image plus the rest of `towards`, clamped to [0, 1]."""
    return ((images - towards) * factor_B.view(-1, 1, 1, 1) + towards).clamp(0, 1)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Luminance [B, 1, S, S]."""
    return (images * torch.tensor(_GREY, device=images.device).view(1, 3, 1, 1)).sum(
        dim=1, keepdim=True
    )


def turn_hue(images: torch.Tensor, turn_B: torch.Tensor) -> torch.Tensor:
    """Turn the hue of images [B, 3, S, S] in [0, 1] by fractions of a circle, as torchvision's
    adjust_hue does.

    With value v and chroma c of a pixel, channel n in (5, 3, 1) at hue h (in sixths of a circle) is
    v - c * min(k, 4 - k) clamped to [0, 1], where k = (n + h) mod 6.
    """
    (value, largest), smallest = images.max(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    chroma = value - smallest
    differences = images.roll(-1, dims=1) - images.roll(-2, dims=1)
    hue = (
        differences.gather(1, largest) / chroma.clamp(min=torch.finfo(images.dtype).tiny)
        + 2 * largest
        + 6 * turn_B.view(-1, 1, 1, 1)
    )
    k = (torch.tensor([5, 3, 1], device=images.device).view(1, 3, 1, 1) + hue) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
