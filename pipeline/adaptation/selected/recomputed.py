"""Selections that need no data: they can be recomputed from the backbone, so a pack need not store
their positions.

    magnitude    |W[o, i]|
    random       a number in [0, 1) for each entry, drawn by the selection's seed and the layer's
    name

Random numbers come from Philox, whose stream numpy guarantees, with 24 bits each, the precision
of float32.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from pipeline.adaptation.parts.connections import TunableLayer
from pipeline.adaptation.selected.ranking import RankedIndices, rank_indices
from pipeline.adaptation.sites import tunable_layers
from pipeline.backbones import LoadedBackbone
from pipeline.specs import Selection

RANDOM_BITS = 24


def is_recomputable(spec: Selection) -> bool:
    """Whether a selection follows from the backbone alone."""
    return spec.criterion in ("magnitude", "random")


def recompute(backbone: LoadedBackbone, spec: Selection, top_k: int) -> dict[str, RankedIndices]:
    """The selection, from the backbone's weights alone."""
    assert is_recomputable(spec)
    layers = tunable_layers(backbone.model)
    if spec.criterion == "magnitude":
        importance = {name: layer.weight.detach().flatten(1) for name, layer in layers.items()}
    else:
        importance = {
            name: random_importance(layer, spec.seed, name) for name, layer in layers.items()
        }
    return rank_indices(importance, spec.level, top_k)


def random_importance(layer: TunableLayer, seed: int, name: str) -> torch.Tensor:
    """Numbers [O, I] (float32) that depend on the weight's shape, the seed and the layer's name."""
    entropy = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest())
    drawn = np.random.Philox(entropy).random_raw(layer.weight.numel()) >> (64 - RANDOM_BITS)
    return torch.from_numpy(drawn.astype(np.float32) / 2**RANDOM_BITS).view(
        layer.weight.flatten(1).shape
    )
