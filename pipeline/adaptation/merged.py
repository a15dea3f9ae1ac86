"""The backbone's own tensors with everything trained written into them, for a network that knows nothing of this package.

    connections, biases, norms, full    W + change
    LoRA (arXiv 2106.09685)             W + scale * up @ down
    SSF (arXiv 2210.08823)              (1 + scale) * W and (1 + scale) * b + shift
    class token                         token + change

The other parts are no change of a weight: `NO_WEIGHT` says why.
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.adaptation.attach import AdaptedModel
from pipeline.adaptation.parts.connections import TunedLayer
from pipeline.adaptation.parts.full import TunedNetwork
from pipeline.adaptation.parts.lora import LowRankLayer
from pipeline.adaptation.parts.norms import TunedNorm
from pipeline.errors import ExportError

NO_WEIGHT = {
    "smoa": "each token chooses its experts",
    "adapter": "a ReLU stands between its two matrices",
    "prompts": "its tokens belong to no layer",
}
"""Why these parts of a recipe cannot be written into the backbone's tensors."""


@torch.no_grad()
def merged_state(model: AdaptedModel, original: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of `original`, the network as timm made it, by timm's names, as `model` computes with them; the head is not among them.

    For recipes without the parts of `NO_WEIGHT`. Raises ExportError where SSF shifts a layer that has no bias.
    """
    state = original.state_dict()
    with model.merged():
        for name, tensors in changed_modules(model, original).items():
            state |= {f"{name}.{key}" if name else key: tensor for key, tensor in tensors.items()}
        _write_rest(state, {tensor.name: value for tensor, value in model.values().items()})
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def changed_modules(model: AdaptedModel, original: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every module that trained values are added to, by its name in `original`; the model has been given its values."""
    if isinstance(model.backbone, TunedNetwork):
        return {"": model.backbone.changed()}
    adapted = dict(model.backbone.named_modules())
    found = {name: _plain_tensors(adapted[name]) for name, _ in original.named_modules() if name in adapted}
    return {name: tensors for name, tensors in found.items() if tensors}


def _plain_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a plain module would hold to compute the same, by the names of its state dict; empty for a module that is plain."""
    if isinstance(module, TunedNorm):
        return module.changed()
    if not isinstance(module, TunedLayer | LowRankLayer):
        return {}
    bias = module.bias if isinstance(module, TunedLayer) else module.base.bias
    return {"weight": module.weight} if bias is None else {"weight": module.weight, "bias": bias}


def _write_rest(state: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """SSF's scales and shifts, and the class token's change."""
    for name in [name.removeprefix("ssf.").removesuffix(".scale") for name in values if name.startswith("ssf.") and name.endswith(".scale")]:
        if f"{name}.bias" not in state:
            raise ExportError(f"the part ssf shifts the output of {name!r}, a layer without a bias, which no weight can hold; export to onnx instead")
        scale, shift = 1 + values[f"ssf.{name}.scale"], values[f"ssf.{name}.shift"]
        state[f"{name}.weight"] = state[f"{name}.weight"] * scale.view(-1, *[1] * (state[f"{name}.weight"].ndim - 1))
        state[f"{name}.bias"] = state[f"{name}.bias"] * scale + shift
    if "class_token.change" in values:
        state["cls_token"] = state["cls_token"] + values["class_token.change"]
