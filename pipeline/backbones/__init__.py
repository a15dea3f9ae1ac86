"""Frozen timm backbones: loaded as timm loads them, and named by a fingerprint of their tensors.

Imports: errors, specs, utils.
"""

from pipeline.backbones.fingerprint import fingerprint
from pipeline.backbones.load import LoadedBackbone, load_backbone, share

__all__ = ["LoadedBackbone", "fingerprint", "load_backbone", "share"]
