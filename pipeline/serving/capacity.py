"""The memory for packs, by itself so that a server's settings are read without torch."""

CAPACITY_BYTES = 512 * 1024**2
"""By default: a thousand and more of most packs."""
