"""What a worker needs for a task, opened and resolved: backbone, recipe, splits, readers.

Imports: adaptation, backbones, data, errors, kinds, specs, utils.
"""
