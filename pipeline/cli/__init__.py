"""The command line: each command is a few calls into the package.

Imports: adaptation, api, cluster, data, driver, errors, packs, registry, reports, server, specs,
utils.
"""

from pipeline.cli.app import main

__all__ = ["main"]
