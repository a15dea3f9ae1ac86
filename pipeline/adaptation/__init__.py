"""The trained parts of a recipe: planned, attached to the frozen backbone, and packed.

Imports: backbones, data, errors, packs, specs, utils.
"""

from pipeline.adaptation.attach import AdaptedModel, attach
from pipeline.adaptation.recipe_plan import PlannedTensor, plan
from pipeline.adaptation.selected.ranking import RankedIndices, SelectedIndex, rank_indices
from pipeline.adaptation.selected.recomputed import is_recomputable, recompute

__all__ = [
    "AdaptedModel",
    "PlannedTensor",
    "RankedIndices",
    "SelectedIndex",
    "attach",
    "is_recomputable",
    "plan",
    "rank_indices",
    "recompute",
]
