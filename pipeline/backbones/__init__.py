"""Unmodified timm backbones: loading, preprocessing, fingerprint."""

from pipeline.backbones.fingerprint import fingerprint
from pipeline.backbones.load import LoadedBackbone, load_backbone

__all__ = ["LoadedBackbone", "fingerprint", "load_backbone"]
