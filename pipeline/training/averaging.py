"""An exponential moving average of the trained parameters, used in their place from the end of each
epoch to the start of the next.

    average <- d * average + (1 - d) * parameter,    d = min(decay, (1 + t) / (10 + t)) at step t

The second term of d lets short runs forget their initial values: with a decay of 0.9998 alone, the
average of a run of 300 steps would be 94 % initialisation. The averages are kept in the optimiser's
state, so checkpoints include them.
"""

from __future__ import annotations

import torch

_AVERAGE = "average"


class MovingAverage:
    """The moving average of everything that `optimiser` trains. A decay of 0 averages nothing: the
    average is the parameter.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, decay: float) -> None:
        self._optimiser, self._decay = optimiser, decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters after step number `step`, counted from 0."""
        if self._decay == 0:
            return
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        for parameter in self._parameters():
            state = self._optimiser.state[parameter]
            if _AVERAGE not in state:
                state[_AVERAGE] = parameter.detach().clone()
            state[_AVERAGE].lerp_(parameter, weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages: once before they are used, once before training
        continues.
        """
        for parameter in self._parameters():
            state = self._optimiser.state[parameter]
            if _AVERAGE in state:
                average = state[_AVERAGE].clone()
                state[_AVERAGE].copy_(parameter)
                parameter.copy_(average)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [
            parameter for group in self._optimiser.param_groups for parameter in group["params"]
        ]
