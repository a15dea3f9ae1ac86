"""A pack as an adapter of HuggingFace PEFT: connections as SHiRA (arXiv 2406.13175), low-rank
changes as LoRA (arXiv 2106.09685).

    adapter_config.json          method, ranks, the layers it changes (`target_modules`) and those
                                 stored whole (`modules_to_save`)
    adapter_model.safetensors    base_model.model.LAYER.{shira_weight, shira_indices} or
                                 {lora_A.weight, lora_B.weight}

SHiRA's layout holds r * (O + I) entries of a Linear layer [O, I], the same r everywhere: unselected
entries with a change of zero pad it. A convolution, a layer too small for that
number, a norm and the classifier are stored whole. PEFT's model is timm's own with a classifier:
`PeftModel.from_pretrained(timm.create_model(NAME, pretrained=True, num_classes=C), FOLDER)`.
Shapes: O outputs, I inputs, S ranks of all of a layer's low-rank changes together, N values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.adaptation import AdaptedModel
from pipeline.adaptation.merged import changed_modules
from pipeline.adaptation.packing import from_pack
from pipeline.adaptation.parts.lora import LowRankLayer
from pipeline.adaptation.sites import weight_reader
from pipeline.backbones import LoadedBackbone
from pipeline.errors import ExportError
from pipeline.exchange.merged_checkpoint import head_state, plain_network
from pipeline.packs import Pack
from pipeline.specs import PARTS
from pipeline.utils.files import whole

METHODS = ("connections", "lora")
Tensors = dict[str, torch.Tensor]


def export_peft(pack: Pack, backbone: LoadedBackbone, folder: Path) -> None:
    """Write the folder, atomically.

    Raises:
        ExportError: the pack's parts are not one method of PEFT's, with or without norms.
        StorageError: the folder exists or cannot be written.
    """
    method = _method(pack.metadata.recipe, backbone.model)
    model, plain = from_pack(pack, backbone), plain_network(pack.metadata, backbone)
    head = head_state(model, plain)
    with torch.no_grad(), model.merged():
        tensors, settings = (
            _as_shira(model, backbone.model) if method == "connections" else _as_lora(model)
        )
        targets = {
            name.rpartition(".shira_")[0] or name.rpartition(".lora_")[0] for name in tensors
        }
        stored = {
            name: changed
            for name, changed in changed_modules(model, backbone.model).items()
            if name not in targets
        }
    whole_tensors = {
        f"{name}.{key}": tensor
        for name, changed in stored.items()
        for key, tensor in changed.items()
    } | head
    config = {
        **settings,
        "base_model_name_or_path": pack.metadata.backbone["model"],
        "inference_mode": True,
        "target_modules": sorted(targets),
        "modules_to_save": sorted({*stored, *(name.rpartition(".")[0] for name in head)}),
        "task_type": None,
    }
    with whole(folder) as scratch:
        scratch.mkdir()
        content = {
            f"base_model.model.{name}": tensor.detach().contiguous()
            for name, tensor in {**tensors, **whole_tensors}.items()
        }
        save_file(content, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        (scratch / "adapter_config.json").write_text(
            json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )


def _method(recipe: dict[str, Any], model: nn.Module) -> str:
    parts = [part for part in PARTS if recipe.get(part) is not None]
    methods, others = (
        [part for part in parts if part in METHODS],
        [part for part in parts if part not in (*METHODS, "norms")],
    )
    hint = "export to timm or onnx instead"
    if others:
        raise ExportError(
            f"PEFT's SHiRA and LoRA layouts have no place for the part {others[0]} of this pack;"
            f" {hint}"
        )
    if len(methods) != 1:
        given = "both connections and lora" if methods else "neither connections nor lora"
        raise ExportError(
            f"a PEFT adapter is of one method, SHiRA or LoRA; this pack has {given}; {hint}"
        )
    reader = weight_reader(model)
    if reader is not None:
        raise ExportError(
            f"{type(model).__name__}'s {reader!r} uses a layer's weight without calling the layer,"
            f" where PEFT changes nothing; {hint}"
        )
    return methods[0]


# --- SHiRA ----------------------------------------------------------------------------------------


def _as_shira(model: AdaptedModel, original: nn.Module) -> tuple[Tensors, dict[str, Any]]:
    values = {
        tensor.name: value
        for tensor, value in model.values().items()
        if tensor.part == "connections"
    }
    layers = {
        name: (index_N, original.get_submodule(name)) for name, index_N in model.positions().items()
    }
    linear = {
        name: (index_N, layer)
        for name, (index_N, layer) in layers.items()
        if isinstance(layer, nn.Linear)
    }
    rank = max(
        (-(-len(index_N) // sum(layer.weight.shape)) for index_N, layer in linear.values()),
        default=0,
    )
    fitting = {
        name: pair
        for name, pair in linear.items()
        if rank * sum(pair[1].weight.shape) <= pair[1].weight.numel()
    }
    if not fitting:
        raise ExportError(
            "PEFT's SHiRA layout holds Linear layers, and none here is large enough for it; export"
            " to timm or onnx instead"
        )
    tensors: Tensors = {}
    for name, (index_N, layer) in fitting.items():
        index_N, values_N = _filled_up(
            index_N, values[name], rank * sum(layer.weight.shape), layer.weight.numel()
        )
        columns = layer.weight[0].numel()
        tensors[f"{name}.shira_weight"] = values_N
        tensors[f"{name}.shira_indices"] = torch.stack(
            [index_N // columns, index_N % columns]
        ).int()
    return tensors, {
        "peft_type": "SHIRA",
        "r": rank,
        "mask_type": "random",
        "random_seed": 0,
        "fan_in_fan_out": False,
    }


def _filled_up(
    index_N: torch.Tensor, values_N: torch.Tensor, count: int, entries: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad to `count` ascending indices and their values, with the first other entries and zeros."""
    is_free = torch.ones(entries, dtype=torch.bool)
    is_free[index_N] = False
    free = is_free.nonzero().flatten()[: count - len(index_N)]
    indices, order = torch.cat([index_N, free]).sort()
    return indices, torch.cat([values_N, values_N.new_zeros(len(free))])[order]


# --- LoRA -----------------------------------------------------------------------------------------


def _as_lora(model: AdaptedModel) -> tuple[Tensors, dict[str, Any]]:
    """Changes of q, k and v are one change of their fused layer. The scale is in `lora_B`, so
    `alpha` is the rank.
    """
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    for name, layer in model.backbone.named_modules():
        if isinstance(layer, LowRankLayer):
            down_SI, up_OS = layer.matrices()
            kernel = (1, 1) if layer.base.weight.ndim == 4 else ()
            tensors[f"{name}.lora_A.weight"] = down_SI.view(*down_SI.shape, *kernel)
            tensors[f"{name}.lora_B.weight"] = up_OS.view(*up_OS.shape, *kernel)
            ranks[name] = len(down_SI)
    rank = max(ranks.values())
    others = {name: value for name, value in ranks.items() if value != rank}
    patterns = {"rank_pattern": others, "alpha_pattern": others}
    return tensors, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        **patterns,
    }
