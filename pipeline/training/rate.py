"""The learning rate of a recipe that names none: in inverse proportion to the backbone's width.

    rate = 0.008 * 192 / width, at most 0.008

Adam moves every value by about the learning rate in a step, whatever its size. What the steps of all values
do to an output is their sum, which grows with the width: hence the inverse proportion (Tensor Programs V,
arXiv 2203.03466). 0.008 was tuned on the demo's backbone of width 192; at 768, a ViT-B, the rule gives 0.002,
the median of the rates that GPS's scripts tuned for VTAB-1k (tasks/vtab1k). What other rates cost is
measured in benchmarks/results/learning_rate.md.
"""

from __future__ import annotations

from pipeline.backbones import LoadedBackbone
from pipeline.spec import Recipe

TUNED_RATE, TUNED_WIDTH = 0.008, 192


def default_learning_rate(width: int) -> float:
    """The peak for a backbone whose features have `width` numbers, rounded to two digits."""
    return float(f"{TUNED_RATE * min(1.0, TUNED_WIDTH / width):.1e}")


def with_learning_rate(recipe: Recipe, backbone: LoadedBackbone) -> Recipe:
    """The recipe with the backbone's learning rate written in where it names none."""
    if recipe.training.learning_rate is not None:
        return recipe
    training = recipe.training.changed(learning_rate=default_learning_rate(backbone.width))
    return recipe.model_copy(update={"training": training})
