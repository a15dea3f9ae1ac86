"""The study: which configurations are tried, what is recorded, and which one is the champion.

Imports: adaptation, cluster, errors, inputs, kinds, selection, specs, training, utils.
"""
