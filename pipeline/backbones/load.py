"""Loading an unmodified timm model as a frozen feature extractor.

The model is built at its native resolution, its weights are read and fingerprinted, and only then is it set to the task's input size, so that one
checkpoint keeps one fingerprint at every resolution. A float32 checkpoint is not copied: the model's tensors are pages of the file, which all
processes of a machine that load it share. The mapping is private, so what a process might write into its tensors reaches neither the file nor
another process.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.backbones.fingerprint import fingerprint_and_trail
from pipeline.errors import BackboneError, StorageError
from pipeline.spec import Backbone, Input

RANDOM_WEIGHTS_SEED = 0
_NOT_ARCHITECTURE = {
    "checkpoint_path",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "pretrained_strict",
    "features_only",
    "in_chans",
}


@dataclass(frozen=True)
class LoadedBackbone:
    """A frozen network that maps images [B, 3, S, S] to features [B, `width`]; `state` are its tensors at its native resolution.

    `trail` has two hex digits for each of them, in order of name (see `fingerprint_and_trail`).
    """

    model: nn.Module
    state: Mapping[str, torch.Tensor]
    fingerprint: str
    trail: str
    width: int
    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def fresh_model(self) -> nn.Module:
        """A copy whose modules can be replaced, moved and converted freely; it shares its numbers, so nothing may be written in place."""
        # Parameters of its own on the same storage: `to` and `double` set a parameter's data, and would take a shared parameter along.
        shared: dict[int, torch.Tensor] = {id(tensor): nn.Parameter(tensor.detach(), requires_grad=False) for tensor in self.model.parameters()}
        shared |= {id(tensor): tensor for tensor in self.model.buffers()}
        return copy.deepcopy(self.model, memo=shared)


def load_backbone(spec: Backbone, task_input: Input) -> LoadedBackbone:
    """Load `spec` for square inputs of `task_input.size_px`; one copy is kept for each configuration and process.

    Raises:
        BackboneError: unknown model or arguments, missing or misfitting checkpoint, or a size the model cannot take.
    """
    return _load_cached(spec.model_dump_json(), task_input.model_dump_json())


def share(backbone: LoadedBackbone, path: Path) -> None:
    """Write a backbone's tensors to `path`, as float32 and from wherever they came, for other processes to load as its checkpoint.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in backbone.state.items()}, scratch)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise StorageError(f"{path}: the backbone cannot be written for workers to share ({error}); free space, or choose another folder") from None


class _Uninitialised(TorchFunctionMode):
    """Leaves tensors as they were allocated where a model would draw random numbers, which takes seconds: all are read from a checkpoint."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "").endswith(("uniform_", "normal_", "erfinv_")):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=4)
def _load_cached(spec_json: str, input_json: str) -> LoadedBackbone:
    spec, task_input = Backbone.model_validate_json(spec_json), Input.model_validate_json(input_json)
    model = _create(spec)
    if spec.weights not in ("pretrained", "random"):
        _read_checkpoint(model, Path(spec.weights))
    state = model.state_dict()
    digest, trail = fingerprint_and_trail(state)
    _set_input_size(model.eval(), spec.model, task_input.size_px)
    model.requires_grad_(False)
    config: Any = model.pretrained_cfg
    width: Any = model.head_hidden_size
    return LoadedBackbone(
        model=model,
        state=state,
        fingerprint=digest,
        trail=trail,
        width=int(width),
        size_px=task_input.size_px,
        mean=tuple(task_input.mean or spec.mean or config["mean"]),
        std=tuple(task_input.std or spec.std or config["std"]),
    )


def _create(spec: Backbone) -> nn.Module:
    refused = sorted(spec.arguments.keys() & _NOT_ARCHITECTURE)
    if refused:
        raise BackboneError(
            f"backbone.arguments: {', '.join(refused)} cannot be set here: weights are backbone.weights, images have 3 channels; leave it out"
        )
    if not timm.is_model(spec.model):
        near = difflib.get_close_matches(spec.model.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise BackboneError(f"backbone.model: given {spec.model!r}, which timm {timm.__version__} does not know; {hint}")
    all_are_read = spec.weights not in ("pretrained", "random")
    with torch.random.fork_rng(devices=[]), _Uninitialised() if all_are_read else contextlib.nullcontext():
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        try:
            return timm.create_model(spec.model, pretrained=spec.weights == "pretrained", num_classes=0, **spec.arguments)
        except Exception as error:
            if "pretrained tag" in str(error):
                raise BackboneError(f"backbone.model: given {spec.model!r}: {error}; timm.list_pretrained() lists the tags") from None
            if "No pretrained weights" in str(error):
                raise BackboneError(f"backbone.weights: timm has none for {spec.model}; give the path of a safetensors checkpoint") from None
            if spec.weights != "pretrained" or isinstance(error, TypeError | AssertionError | ValueError) or "state_dict" in str(error):
                raise BackboneError(f"backbone.arguments: {json.dumps(spec.arguments)} do not fit {spec.model}: {error}") from None
            raise BackboneError(
                f"backbone.weights: 'pretrained' weights of {spec.model} could not be fetched ({type(error).__name__}: {str(error)[:200]}); "
                "check the connection, or download a safetensors checkpoint and give its path as `weights`"
            ) from None


def _read_checkpoint(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise BackboneError(f"backbone.weights: given {str(path)!r}, no such file; give a safetensors checkpoint, 'pretrained' or 'random'")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"backbone.weights: {path} is not a readable safetensors file ({error}); download it again") from None
    config: Any = model.pretrained_cfg
    classifier = config.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}
    expected = model.state_dict()
    faults = _misfits(expected, state)
    if faults:
        raise BackboneError(f"backbone.weights: {path} does not fit {type(model).__name__} as configured: {'; '.join(faults)}")
    model.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in state.items()}, assign=True)


def _misfits(expected: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> list[str]:
    missing, surplus = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    reshaped = [name for name in sorted(expected.keys() & given.keys()) if expected[name].shape != given[name].shape]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unknown", surplus))
        if names
    ]
    return faults + [f"{name} is {tuple(given[name].shape)}, expected {tuple(expected[name].shape)}" for name in reshaped[:3]]


def _set_input_size(model: nn.Module, name: str, size_px: int) -> None:
    set_input_size: Any = getattr(model, "set_input_size", None)
    try:
        if set_input_size is not None:
            set_input_size(img_size=(size_px, size_px))
        with torch.inference_mode():
            features = model(torch.zeros(1, 3, size_px, size_px))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise BackboneError(f"input.size_px: given {size_px}, which {name} cannot take ({error}); choose a multiple of its patch size") from None
    if features.ndim != 2:
        raise BackboneError(
            f"backbone.arguments: {name} gives features of shape {list(features.shape)}; expected one pooled vector; leave global_pool at its default"
        )
