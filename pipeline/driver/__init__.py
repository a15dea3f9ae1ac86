"""Run everything: batches of tasks, comparisons, monitoring, and the work folder.

Imports: adaptation, backbones, cluster, data, errors, inputs, kinds, packs, registry, reports,
search, selection, serving, specs, training, utils.
"""
