"""One training loop, its evaluation, and the final fit."""

from pipeline.training.evaluate import Score, evaluate
from pipeline.training.inputs import Inputs, open_inputs
from pipeline.training.loop import train_epochs
from pipeline.training.ranks import ALONE, Ranks

__all__ = ["ALONE", "Inputs", "Ranks", "Score", "evaluate", "open_inputs", "train_epochs"]
