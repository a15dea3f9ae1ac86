"""Unmodified timm backbones: loading, preprocessing, fingerprint."""

from pipeline.backbones.fingerprint import fingerprint
from pipeline.backbones.load import LoadedBackbone, load_backbone, share

__all__ = ["LoadedBackbone", "fingerprint", "load_backbone", "share"]
