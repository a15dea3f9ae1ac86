"""Packs at work: predictions from a pack on its backbone.

Imports: adaptation, backbones, data, errors, packs, specs, utils.
"""
