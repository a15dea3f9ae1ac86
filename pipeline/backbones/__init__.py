"""Unmodified timm backbones: loading, preprocessing, fingerprint."""
