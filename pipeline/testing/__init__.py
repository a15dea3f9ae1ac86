"""Conformance suites for people who extend the package, to be called from their tests.

Imports: kinds.
"""

from pipeline.testing.kinds import check_kind, check_metric

__all__ = ["check_kind", "check_metric"]
