"""One training loop, its evaluation, and the final fit.

Imports: adaptation, backbones, data, errors, inputs, kinds, packs, specs, utils.
"""

from pipeline.inputs.task_inputs import Inputs, open_inputs
from pipeline.training.evaluate import evaluate
from pipeline.training.loop import train_epochs
from pipeline.training.ranks import ALONE, Ranks

__all__ = ["ALONE", "Inputs", "Ranks", "evaluate", "open_inputs", "train_epochs"]
