"""Ray: the session, its capacity, the tasks on it, and groups of ranks.

Imports: errors, training, utils.
"""
