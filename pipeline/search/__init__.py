"""The study: which configurations are tried, what is kept of them, and which is the champion.

Imports: adaptation, cluster, errors, inputs, selection, specs, training, utils.
"""
