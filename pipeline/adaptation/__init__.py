"""What is trained beside the frozen backbone: connections, biases, norms, the SMoA bank and the head."""

from pipeline.adaptation.attach import AdaptedModel, SelectedIndex, attach
from pipeline.adaptation.plan import PlannedTensor, plan

__all__ = ["AdaptedModel", "PlannedTensor", "SelectedIndex", "attach", "plan"]
