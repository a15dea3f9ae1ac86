"""Augmentation of a whole batch at once, on the device of the images.

light    crop 50-100 % of the area, flip, brightness and contrast
crop     crop 8-100 % of the area, flip: timm's and torchvision's RandomResizedCrop
strong   `crop`, colour jitter (brightness, contrast and saturation 0.4, hue 0.1, in random order)
         with probability 0.8, grey with probability 0.2: the views of the supervised contrastive
         loss (arXiv 2004.11362) as GPS (arXiv 2312.10136) draws them

Crop and flip are one affine map of the sampling grid, x' = s_x x + t_x and y' = s_y y + t_y, with a
negative s_x where the image is mirrored, so the batch is resampled once. All random numbers of a
batch are drawn on the CPU, so a seed draws the same ones wherever the images are, and sent to the
images' device in one copy, for which nothing waits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from pipeline.specs import Augmentation
from pipeline.utils.devices import all_to_device

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
    draw, sizes = _Numbers(generator, len(pixels)), list[list[int]]()
    maps_B23 = _crop(draw, 0.5 if kind == "light" else 0.08, flip)
    if kind == "strong":
        colours_NB, sizes = _rounds(draw)
    else:
        colours_NB = _factors(draw(2 if kind == "light" else 0))
    maps_B23, colours_NB = all_to_device([maps_B23, colours_NB], pixels.device)
    grid = functional.affine_grid(maps_B23, list(pixels.shape), align_corners=False)
    crops = functional.grid_sample(
        pixels, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    if targets.shape == images[:, 0].shape:
        targets = _moved_masks(targets, grid)
    if kind == "light":
        crops = _light_jitter(crops, colours_NB)
    elif kind == "strong":
        _change_colours(crops, colours_NB, sizes)
    return crops, targets


def _moved_masks(masks: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    moved = functional.grid_sample(
        masks[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False
    )
    return moved[:, 0].to(masks.dtype)


@dataclass(frozen=True)
class _Numbers:
    """Uniform random numbers in [0, 1), one per image and draw, on the CPU."""

    generator: torch.Generator
    images: int

    def __call__(self, *shape: int) -> torch.Tensor:
        """Numbers [*shape, B]."""
        return torch.rand(*shape, self.images, generator=self.generator)


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
    theta = torch.zeros(draw.images, 2, 3)
    theta[:, 0, 0] = torch.where((mirror < 0.5) | (not flip), width, -width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * x - 1)
    theta[:, 1, 2] = (1 - height) * (2 * y - 1)
    return theta


def _light_jitter(images: torch.Tensor, factors_2B: torch.Tensor) -> torch.Tensor:
    """Scale contrast about each image's mean, then brightness; [B, 3, S, S]."""
    contrast, brightness = factors_2B
    return (
        _blend(images, images.mean(dim=(1, 2, 3), keepdim=True), contrast)
        * brightness.view(-1, 1, 1, 1)
    ).clamp(0, 1)


def _rounds(draw: _Numbers) -> tuple[torch.Tensor, list[list[int]]]:
    """torchvision's ColorJitter with a probability, then RandomGrayscale with a probability, as
    five rounds in each of which an image is changed by one of `_CHANGES` or by none: first all four
    in an order that differs per image, then perhaps saturation with a factor of zero.

    Returns:
        For each round the images' numbers, grouped by change, and then for each round the amounts
        of these changes, [10, B]; for each round the number of images in each group, of which the
        last is of those that are not changed.
    """
    order_4B = draw(4).argsort(dim=0)
    amounts_4B = torch.cat([_factors(draw(3)), HUE_JITTER * (2 * draw(1) - 1)])
    is_jittered, is_grey = draw(1) < COLOUR_PROBABILITY, draw(1) < GREY_PROBABILITY
    none = len(_CHANGES)
    change_5B = torch.cat(
        [
            torch.where(is_jittered, order_4B, none),
            torch.where(is_grey, _CHANGES.index(_saturate), none),
        ]
    )
    amounts_5B = torch.cat([amounts_4B.gather(0, order_4B), torch.zeros(1, draw.images)])
    index_5B = change_5B.argsort(dim=1, stable=True)
    sizes = [change_B.bincount(minlength=none + 1).tolist() for change_B in change_5B]
    return torch.cat([index_5B, amounts_5B.gather(1, index_5B)]), sizes


def _change_colours(images: torch.Tensor, rounds: torch.Tensor, sizes: list[list[int]]) -> None:
    """Change images [B, 3, S, S] in place as `_rounds` says. The sizes of groups are known to the
    host, which therefore need not wait for a device to find the images of a group.
    """
    index_RB, amounts_RB = rounds.chunk(2)
    for index_B, amount_B, of_round in zip(index_RB.long(), amounts_RB, sizes, strict=True):
        groups = zip(index_B.split(of_round), amount_B.split(of_round), strict=True)
        for change, (chosen, amount) in zip(_CHANGES, groups, strict=False):
            images[chosen] = change(images[chosen], amount)


def _factors(numbers: torch.Tensor) -> torch.Tensor:
    return 1 + JITTER * (2 * numbers - 1)


def _blend(images: torch.Tensor, towards: torch.Tensor, factor_B: torch.Tensor) -> torch.Tensor:
    """Blend: `factor` of the image plus the rest of `towards`, clamped to [0, 1]."""
    return ((images - towards) * factor_B.view(-1, 1, 1, 1) + towards).clamp(0, 1)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Luminance [B, 1, S, S]."""
    return (images * _grey_weights(images.device)).sum(dim=1, keepdim=True)


@functools.cache
def _grey_weights(device: torch.device) -> torch.Tensor:
    """The channels' weights [3, 1, 1]; kept, because a copy to a device may wait for it."""
    return torch.tensor(_GREY, device=device).view(3, 1, 1)


def _brighten(images: torch.Tensor, factor_B: torch.Tensor) -> torch.Tensor:
    return (images * factor_B.view(-1, 1, 1, 1)).clamp(0, 1)


def _change_contrast(images: torch.Tensor, factor_B: torch.Tensor) -> torch.Tensor:
    return _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), factor_B)


def _saturate(images: torch.Tensor, factor_B: torch.Tensor) -> torch.Tensor:
    return _blend(images, _grey(images), factor_B)


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
    k = (torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1) + hue) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


_CHANGES = (_brighten, _change_contrast, _saturate, turn_hue)
"""Of colours, by an amount per image, in torchvision's order."""
