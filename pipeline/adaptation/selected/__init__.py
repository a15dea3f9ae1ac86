"""Selections: ranked connections, the top K of them, and criteria that need no data."""
