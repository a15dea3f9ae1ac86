"""One training loop, its evaluation and its metrics."""

from pipeline.training.evaluate import Score, evaluate
from pipeline.training.inputs import Inputs, open_inputs
from pipeline.training.loop import train_epochs

__all__ = ["Inputs", "Score", "evaluate", "open_inputs", "train_epochs"]
