"""Packs at work: predictions from a pack, and its accuracy measured again."""
