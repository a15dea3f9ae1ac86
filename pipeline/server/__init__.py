"""Packs behind HTTP: one backbone, any task of the registry, images of all in mixed batches.

Imports: data, errors, packs, registry, serving, utils.
"""
