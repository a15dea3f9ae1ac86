"""Task kinds and their metrics: what a label means, how a task is trained, and how it is measured.

A kind or a metric is one file of this folder that registers itself; `pipeline.testing` has the
conformance suites that each must pass.

Imports: nothing.
"""

from pipeline.kinds.metrics import Metric, Score, metric_named, metrics_of, score
from pipeline.kinds.protocol import (
    IGNORED,
    Annotations,
    Label,
    Outcomes,
    TaskKind,
    classes_in,
)
from pipeline.kinds.registry import kind_named, kind_names, register_kind

__all__ = [
    "IGNORED",
    "Annotations",
    "Label",
    "Metric",
    "Outcomes",
    "Score",
    "TaskKind",
    "classes_in",
    "kind_named",
    "kind_names",
    "metric_named",
    "metrics_of",
    "register_kind",
    "score",
]
