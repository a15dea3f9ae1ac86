"""One training loop, its evaluation and its metrics."""

from pipeline.training.evaluate import Score, evaluate
from pipeline.training.loop import train_epochs

__all__ = ["Score", "evaluate", "train_epochs"]
