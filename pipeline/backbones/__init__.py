"""Unmodified timm backbones: loading, checkpoints, fingerprint."""

from pipeline.backbones.fingerprint import fingerprint
from pipeline.backbones.load import LoadedBackbone, load_backbone, share

__all__ = ["LoadedBackbone", "fingerprint", "load_backbone", "share"]
