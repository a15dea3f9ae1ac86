"""Tiny random backbones that several test files need."""

from __future__ import annotations

from typing import Any

from pipeline.specs import Backbone

SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [1, 2],
}
"""Arguments of a Swin of two blocks."""
SWIN_V2 = Backbone(model="swinv2_tiny_window8_256", arguments=SWIN, weights="random")
