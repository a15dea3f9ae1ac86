"""Packs in the MLflow model registry: registered, looked up and loaded.

Imports: data, errors, kinds, search, serving, utils.
"""
