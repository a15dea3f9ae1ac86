"""The default learning rate, inversely proportional to the backbone's width.

    rate = 0.008 * 192 / width, at most 0.008

Adam moves every value by about the learning rate per step, whatever the gradient's size. The effect
on an output is the sum over its inputs, which grows with the width: hence the inverse proportion
(Tensor Programs V, arXiv 2203.03466). 0.008 was tuned on the demo's backbone of width 192; at 768,
a ViT-B, the rule gives 0.002, the median of the rates in GPS's scripts for VTAB-1k (tasks/vtab1k).
benchmarks/results/learning_rate.md has measurements of other rates. The width of the features
would be misleading: EfficientNet's 1280 are those of its last layer alone, and 0.001 is too low for
it.
"""

from __future__ import annotations

import statistics

from torch import nn

from pipeline.backbones import LoadedBackbone
from pipeline.specs import Recipe

TUNED_RATE, TUNED_WIDTH = 0.008, 192


def default_learning_rate(model: nn.Module) -> float:
    """The peak for a backbone, rounded to two digits; its width is the median number of inputs of a
    neuron over its layers, D in a ViT.
    """
    inputs = [
        layer.weight[0].numel()
        for layer in model.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    return float(f"{TUNED_RATE * min(1.0, TUNED_WIDTH / statistics.median_low(inputs)):.1e}")


def with_learning_rate(recipe: Recipe, backbone: LoadedBackbone) -> Recipe:
    """The recipe with the default learning rate of the backbone filled in if it names none."""
    if recipe.training.learning_rate is not None:
        return recipe
    training = recipe.training.changed(learning_rate=default_learning_rate(backbone.model))
    return recipe.model_copy(update={"training": training})
