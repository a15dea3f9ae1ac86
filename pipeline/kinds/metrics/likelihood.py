"""The probability that the right class gets, as a geometric mean over the samples: exp(-H) for the
cross-entropy H.

It tells two models apart that are right on the same samples, with far fewer samples than counting
their errors needs: it is a strictly proper score (Gneiting & Raftery 2007, JASA 102, 359-378).
"""

from __future__ import annotations

import numpy as np

from pipeline.kinds.metrics.registry import metric
from pipeline.kinds.protocol import Outcomes


@metric("likelihood", "classification")
def likelihood(outcomes: Outcomes, weights_RN: np.ndarray) -> np.ndarray:
    """Of the softmax of the logits."""
    logits_NC = outcomes.outputs.astype(np.float64)
    right_N = logits_NC[np.arange(len(outcomes)), outcomes.targets]
    log_N = right_N - np.logaddexp.reduce(logits_NC, axis=1)
    mean: np.ndarray = np.exp(weights_RN @ log_N / weights_RN.sum(axis=1))
    return mean
