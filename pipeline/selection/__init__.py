"""Which connections a task may change: by gradient (GPS, arXiv 2312.10136) or by activation
(FPS, arXiv 2510.27359).

Imports: adaptation, backbones, data, errors, inputs, kinds, specs, utils.
"""

from pipeline.selection.contrastive import supervised_contrastive_loss
from pipeline.selection.stage import (
    read_selection,
    select,
    select_locally,
    select_locally_if_faster,
    selection_key,
    write_selection,
)

__all__ = [
    "read_selection",
    "select",
    "select_locally",
    "select_locally_if_faster",
    "selection_key",
    "supervised_contrastive_loss",
    "write_selection",
]
