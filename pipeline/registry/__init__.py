"""Packs in the MLflow model registry: registered, looked up and loaded.

Imports: errors, kinds, search, serving, utils.
"""
