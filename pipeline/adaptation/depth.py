"""Which of a backbone's blocks each of its parameters belongs to, as timm groups them.

timm gives every architecture a `group_matcher`, which orders its parameters from the input to the
output for layer-wise learning rates. Its first group, the stem, comes before block 0.
"""

from __future__ import annotations

from collections.abc import Mapping

from timm.models import group_parameters

from pipeline.adaptation.watched import learnt_once
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError


@learnt_once
def blocks_of(backbone: LoadedBackbone) -> Mapping[str, int]:
    """The block of each parameter, by name, from 0; -1 for those of the stem. What follows the last
    block belongs to it, or is one more.

    Raises:
        BackboneError: timm does not know the order of this architecture's parameters.
    """
    model = backbone.model
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise BackboneError(
            f"recipe.from_block: timm does not number the blocks of {type(model).__name__}; leave"
            " it out"
        )
    groups = group_parameters(model, matcher(coarse=False), reverse=True)
    return {name: int(group) - 1 for name, group in groups.items()}


def checked_block(backbone: LoadedBackbone, first: int) -> int:
    """`first` itself. Raises BackboneError if the backbone has no such block, or as `blocks_of`."""
    last = max(blocks_of(backbone).values())
    if first > last:
        raise BackboneError(
            f"recipe.from_block: given {first}, but the last block of"
            f" {type(backbone.model).__name__} is {last}; expected at most {last}"
        )
    return first
