"""Conformance suites for whoever extends the package: call them from a test of your own.

Imports: kinds.
"""

from pipeline.testing.kinds import check_kind, check_metric

__all__ = ["check_kind", "check_metric"]
