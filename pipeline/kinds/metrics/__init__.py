"""Metrics: numbers in [0, 1], larger is better, computed from `Outcomes` with their standard
errors.

A metric is computed under weights: how often each sample counts. All ones give its value, draws
with replacement give its standard error by the bootstrap (Efron 1979), 200 of them at once. That
is why the formulas stand here in numpy; tests hold them against torchmetrics. Calling it for every
resample would take seconds per epoch, and importing it longer than importing torch.

A metric that is a mean over classes leaves out those that it is not defined for, because no sample
of the split has them; where it is defined for none, it is 0.
"""

from pipeline.kinds.metrics.registry import Metric, Score, metric, metric_named, metrics_of, score

__all__ = ["Metric", "Score", "metric", "metric_named", "metrics_of", "score"]
