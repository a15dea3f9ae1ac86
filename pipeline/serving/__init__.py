"""Packs at work: predictions from a pack on its backbone.

Imports: adaptation, backbones, data, errors, kinds, packs, specs, utils.
"""
