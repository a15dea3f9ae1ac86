"""Conformance suites for people who extend the package, to be called from their tests.

Imports: adaptation, backbones, errors, kinds, packs, specs.
"""

from pipeline.testing.kinds import check_kind, check_metric
from pipeline.testing.pack_readers import check_pack_reader
from pipeline.testing.parts import check_part, check_refused

__all__ = ["check_kind", "check_metric", "check_pack_reader", "check_part", "check_refused"]
