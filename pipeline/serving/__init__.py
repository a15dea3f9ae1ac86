"""Packs at work: predictions from a file on a resident backbone."""
