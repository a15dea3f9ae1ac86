"""What the tests of point clouds share: a tiny backbone, and a task of drawn solids on it."""

from __future__ import annotations

from typing import Any

from pipeline.specs import Backbone

ARGUMENTS: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "num_groups": 8,
    "group_size": 8,
    "num_points": 64,
}
POINT_BACKBONE = Backbone(model="point_mae", arguments=ARGUMENTS, weights="random")
SOLIDS: dict[str, Any] = {
    "name": "solids",
    "modality": "points",
    "data": {"format": "drawn", "kind": "solids", "train_samples": 120, "test_samples": 60},
    "backbone": POINT_BACKBONE.model_dump(exclude_none=True),
    "recipe": {
        "connections": {"top_k": 2, "bits": 4},
        "smoa": {"experts": 2, "width": 4},
        "training": {"epochs": 6, "batch_size": 16, "learning_rate": 0.01, "augment": "light"},
    },
    "selection": {"batch_size": 16},
}
