"""Frozen timm backbones: loaded as timm loads them, and named by a fingerprint of their tensors.

Imports: data, errors, specs, utils.
"""

from pipeline.backbones.fingerprint import fingerprint
from pipeline.backbones.load import LoadedBackbone, giving_maps, load_backbone, share
from pipeline.backbones.maps import give_several_maps
from pipeline.backbones.segment_anything import SegmentAnything

__all__ = [
    "LoadedBackbone",
    "SegmentAnything",
    "fingerprint",
    "give_several_maps",
    "giving_maps",
    "load_backbone",
    "share",
]
