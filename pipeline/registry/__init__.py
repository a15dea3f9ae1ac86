"""Packs in the MLflow model registry: register, look up, load."""
