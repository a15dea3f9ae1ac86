"""Early stopping that keeps the front: a trial stops if an earlier one, at most as large, was
clearly better at the same epoch.

Comparing metrics alone, as successive halving does, would stop every small pack in favour of large
ones. Here a trial competes only with trials that cost no more bytes. "Clearly" means by two
standard errors of its own validation metric. Only trials that had ended before this one was
proposed count, so the outcome does not depend on timing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pipeline.search.trial_record import TrialRecord

FIRST_SHARE = 1 / 3
"""Fraction of its epochs before which no trial is stopped."""
MARGIN_ERRORS = 2.0
"""Standard errors of the validation metric by which another trial must be better."""


def is_dominated(
    curve: Sequence[float],
    standard_error: float,
    epochs: int,
    size_bytes: int,
    earlier: Iterable[TrialRecord],
) -> bool:
    """Whether to stop a trial with this validation curve so far.

    Args:
        curve: validation metric in [0, 1] after each epoch.
        standard_error: of the curve's last value.
        earlier: trials to compare with; those that failed, are larger than `size_bytes` or ended
            before this epoch do not count.
    """
    epoch = len(curve)
    if epoch < math.ceil(epochs * FIRST_SHARE) or epoch == epochs:
        return False
    margin = MARGIN_ERRORS * standard_error
    rivals = (
        record
        for record in earlier
        if record.state != "failed"
        and record.size_bytes <= size_bytes
        and len(record.curve) >= epoch
    )
    return any(record.curve[epoch - 1] > curve[-1] + margin for record in rivals)
