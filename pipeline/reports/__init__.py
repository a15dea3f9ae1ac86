"""Figures and tables of a study or a comparison, drawn from plain rows.

Imports: errors, kinds, search, specs, utils.
"""
