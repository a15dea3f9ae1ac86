"""A task's inputs, opened and resolved: backbone, recipe, search space, splits,
readers.

Imports: adaptation, backbones, data, errors, kinds, specs, utils.
"""
