"""The command line: each command is a few calls into the package.

Imports: adaptation, api, data, driver, errors, packs, registry, reports, specs, utils.
"""

from pipeline.cli.app import main

__all__ = ["main"]
