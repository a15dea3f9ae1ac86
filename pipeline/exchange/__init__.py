"""Other projects' formats: what a pack can be written as, and what can be read as a pack.

Imports: adaptation, backbones, errors, packs, specs, utils.
"""
