"""What runs everything: batches of tasks, comparisons, and what they keep in the work folder.

Imports: adaptation, backbones, cluster, data, errors, packs, registry, reports, search,
selection, serving, specs, training, utils.
"""
