"""The backbone's own tensors with all trained changes merged in, for use without this package.

    connections, biases, norms, full    W + change
    LoRA (arXiv 2106.09685)             W + scale * up @ down
    SSF (arXiv 2210.08823)              (1 + scale) * W and (1 + scale) * b + shift
    class token                         token + change

The other parts cannot be expressed as a change of weights: their `no_weight` says why.
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.adaptation.attach import AdaptedModel
from pipeline.adaptation.part import PARTS, WeightChange
from pipeline.adaptation.parts.biases import changed_parameters
from pipeline.adaptation.parts.full import TunedNetwork


@torch.no_grad()
def merged_state(model: AdaptedModel, original: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of `original`, the network as timm created it, with the changes of `model`
    merged in; without the head.

    For recipes whose parts have no `no_weight`. Raises ExportError where SSF shifts a layer that
    has no bias.
    """
    state = original.state_dict()
    with model.merged():
        for name, tensors in changed_modules(model, original).items():
            state |= {f"{name}.{key}" if name else key: tensor for key, tensor in tensors.items()}
        values = {tensor.name: value for tensor, value in model.values().items()}
        for part in PARTS.values():
            part.write(state, values)
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def changed_modules(model: AdaptedModel, original: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every module that trained values are added to, by its name in `original`; the
    model has been given its values."""
    if isinstance(model.backbone, TunedNetwork):
        return {"": model.backbone.plain_tensors()}
    adapted = dict(model.backbone.named_modules())
    found = {name: adapted[name] for name, _ in original.named_modules() if name in adapted}
    tensors = {
        name: module.plain_tensors()
        if isinstance(module, WeightChange)
        else changed_parameters(module)
        for name, module in found.items()
    }
    return {name: changed for name, changed in tensors.items() if changed}
