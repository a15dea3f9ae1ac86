"""Loading an unmodified timm model as a frozen feature extractor.

The model is built as `model` and `arguments` say, its weights are read and fingerprinted, and only
then is it set to the task's input size, so that one checkpoint keeps one fingerprint at every
`input.size_px`. The fingerprint is of the tensors as timm loads them into that model, after its
filter: the same checkpoint at another `arguments.img_size` or `patch_size` is another backbone,
because its resampled tensors differ. A float32 checkpoint is not copied: the model's tensors are
memory-mapped pages of the file, shared by all processes of a machine that load it. The mapping is
private, so writes reach neither the file nor another process.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.backbones.fingerprint import fingerprint_and_trail
from pipeline.backbones.hub import check_pretrained
from pipeline.backbones.maps import give_maps
from pipeline.backbones.point_transformer import PointTransformer
from pipeline.backbones.segment_anything import SegmentAnything
from pipeline.backbones.timm_sources import resolve_source
from pipeline.backbones.weights_file import read_checkpoint, weights_held_back
from pipeline.data.images import Images
from pipeline.data.modality import Modality
from pipeline.data.points import Points
from pipeline.errors import BackboneError, StorageError
from pipeline.specs import Backbone, Input

RANDOM_WEIGHTS_SEED = 0
_one_at_a_time = (
    threading.Lock()
)  # building sets the global generator's seed and, for a file, replaces timm's loader
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
    """A frozen network that maps what it `takes` to features [B, `width`] or, where it gives maps,
    [B, `width`, h, w]; `state` are its tensors at its native resolution. One with a mask decoder
    gives masks [B, C, h, w], and `width` is that of a class token.

    `spec` has the model's name in timm's registry, whatever it was loaded from.
    `trail` has two hex digits for each of them, in order of name (see `fingerprint_and_trail`).
    """

    model: nn.Module
    state: Mapping[str, torch.Tensor]
    fingerprint: str
    trail: str
    spec: Backbone
    width: int
    takes: Modality
    gives_maps: bool = False

    @property
    def has_decoder(self) -> bool:
        """Whether it ends in a mask decoder."""
        return isinstance(self.model, SegmentAnything)

    @property
    def images(self) -> Images:
        """The images that it takes. Raises BackboneError for a network that takes none."""
        if not isinstance(self.takes, Images):
            raise BackboneError(
                f"{self.spec.model} takes {self.takes.name}, not images; this needs a backbone of"
                " images"
            )
        return self.takes

    @property
    def size_px(self) -> int:
        """The side of the images that it takes."""
        return self.images.size_px

    def fresh_model(self) -> nn.Module:
        """A copy whose modules can be replaced, moved and converted freely; it shares tensor
        storage, so nothing may be written in place.
        """
        # New parameters on the same storage: `to` and `double` set a parameter's data, which
        # would also change a shared parameter.
        shared: dict[int, torch.Tensor] = {
            id(tensor): nn.Parameter(tensor.detach(), requires_grad=False)
            for tensor in self.model.parameters()
        }
        shared |= {id(tensor): tensor for tensor in self.model.buffers()}
        return copy.deepcopy(self.model, memo=shared)


def load_backbone(spec: Backbone, task_input: Input, *, gives_maps: bool = False) -> LoadedBackbone:
    """Load `spec` for square inputs of `task_input.size_px`, by default the model's own size; one
    copy is kept for each configuration and process.

    Args:
        gives_maps: whether its features are a map rather than one pooled vector.

    Raises:
        BackboneError: unknown model or arguments, missing or misfitting checkpoint, a size the
            model cannot take, or a model without maps.
    """
    return _load_cached(spec.model_dump_json(), task_input.model_dump_json(), gives_maps)


def giving_maps(backbone: LoadedBackbone) -> LoadedBackbone:
    """A pooling backbone as one that gives maps, in the same memory. Raises BackboneError for a
    model without maps.
    """
    model = backbone.fresh_model()
    give_maps(model, backbone.spec.model)
    with torch.no_grad():
        shape = model(torch.zeros(1, *backbone.takes.shape)).shape
    _check_features(shape, backbone.spec.model, gives_maps=True)
    return replace(backbone, model=model, width=int(shape[1]), gives_maps=True)


def share(backbone: LoadedBackbone, path: Path) -> None:
    """Write a backbone's tensors to `path` in float32, for other processes to load as its
    checkpoint.

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
        raise StorageError(
            f"{path}: the backbone cannot be written for workers to share ({error}); free space, or"
            " choose another folder"
        ) from None


class _Uninitialised(TorchFunctionMode):
    """Skips random initialisation, which takes seconds, because all tensors are read from a
    checkpoint.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "").endswith(("uniform_", "normal_", "erfinv_")):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=4)
def _load_cached(spec_json: str, input_json: str, gives_maps: bool) -> LoadedBackbone:
    spec, task_input = (
        resolve_source(Backbone.model_validate_json(spec_json)),
        Input.model_validate_json(input_json),
    )
    model = _build(spec)
    state = model.state_dict()
    digest, trail = fingerprint_and_trail(state)
    decoder = model.decoder if isinstance(model, SegmentAnything) else None
    if decoder is not None and not gives_maps:
        raise BackboneError(
            f"backbone.model: {spec.model} has a mask decoder, which a task of labels does not use;"
            f" give its encoder alone, {spec.model.replace('sam_', 'samvit_', 1)}"
        )
    if gives_maps and decoder is None:
        give_maps(model, spec.model)
    if isinstance(model, PointTransformer):
        takes, shape = _set_points(model.eval(), task_input)
    else:
        takes, shape = _set_images(model.eval(), spec, task_input)
    model.requires_grad_(False)
    width: Any = shape[1] if gives_maps else model.head_hidden_size
    if decoder is not None:
        width = decoder.width
    _check_features(shape, spec.model, gives_maps)
    return LoadedBackbone(
        model=model,
        state=state,
        fingerprint=digest,
        trail=trail,
        spec=spec,
        width=int(width),
        takes=takes,
        gives_maps=gives_maps,
    )


def _set_images(model: nn.Module, spec: Backbone, task_input: Input) -> tuple[Modality, torch.Size]:
    """The images that a task gives a model; the shape of the features of one."""
    config: Any = model.pretrained_cfg
    size_px = task_input.size_px or _own_size(spec, config)
    shape = _set_input_size(model, spec.model, size_px)
    mean, std = (
        task_input.mean or spec.mean or config["mean"],
        task_input.std or spec.std or config["std"],
    )
    return Images(size_px, mean=tuple(mean), std=tuple(std)), shape


def _set_points(model: PointTransformer, task_input: Input) -> tuple[Modality, torch.Size]:
    """The clouds that a task gives a model; the shape of the features of one."""
    points = task_input.points or model.num_points
    needed = max(model.num_groups, model.group_size)
    if points < needed:
        raise BackboneError(
            f"input.points: given {points}; expected at least {needed}, for groups of"
            f" {model.group_size} points about {model.num_groups} centres"
        )
    takes = Points(
        points, model.channels, scale=task_input.scale, up=task_input.up, turn=task_input.turn
    )
    with torch.no_grad():
        features: torch.Tensor = model(takes.noise(1))
    return takes, features.shape


def _own_size(spec: Backbone, config: Mapping[str, Any]) -> int:
    """The input size that the model is built for."""
    size = spec.arguments.get("img_size", list(config["input_size"][1:]))
    height, width = size if isinstance(size, list) else (size, size)
    if height != width:
        raise BackboneError(
            f"backbone.arguments: {spec.model} is built for {height} x {width} px; images are"
            " squares: give input.size_px"
        )
    return int(height)


def _build(spec: Backbone) -> nn.Module:
    with _one_at_a_time:
        if spec.weights in ("pretrained", "random"):
            if spec.weights == "pretrained":
                check_pretrained(spec.model)
            model = _create(spec)
            _refuse_tied(model, spec.model)
            return model
        with weights_held_back() as filters, _Uninitialised():
            model = _create(spec)
        _refuse_tied(model, spec.model)
        read_checkpoint(model, Path(spec.weights), filters[0] if filters else None)
        return model


def _create(spec: Backbone) -> nn.Module:
    refused = sorted(spec.arguments.keys() & _NOT_ARCHITECTURE)
    if refused:
        raise BackboneError(
            f"backbone.arguments: {', '.join(refused)} cannot be set here: weights are"
            " backbone.weights, images have 3 channels; leave it out"
        )
    if not timm.is_model(spec.model):
        near = difflib.get_close_matches(
            spec.model.split(".")[0], timm.list_models(), n=3, cutoff=0.5
        )
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise BackboneError(
            f"backbone.model: given {spec.model!r}, which timm {timm.__version__} does not know;"
            f" {hint}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        try:
            return timm.create_model(
                spec.model, pretrained=spec.weights != "random", num_classes=0, **spec.arguments
            )
        except Exception as error:
            if "pretrained tag" in str(error):
                raise BackboneError(
                    f"backbone.model: given {spec.model!r}: {error}; timm.list_pretrained() lists"
                    " the tags"
                ) from None
            if "No pretrained weights" in str(error):
                raise BackboneError(
                    f"backbone.weights: timm has none for {spec.model}; give the path of a"
                    " safetensors checkpoint"
                ) from None
            if (
                spec.weights != "pretrained"
                or isinstance(error, TypeError | AssertionError | ValueError)
                or "state_dict" in str(error)
            ):
                raise BackboneError(
                    f"backbone.arguments: {json.dumps(spec.arguments)} do not fit {spec.model}:"
                    f" {error}"
                ) from None
            raise BackboneError(
                f"backbone.weights: 'pretrained' weights of {spec.model} could not be fetched"
                f" ({type(error).__name__}: {str(error)[:200]}); check the connection, or download"
                " a safetensors checkpoint and give its path as `weights`"
            ) from None


def _refuse_tied(model: nn.Module, name: str) -> None:
    """Raise BackboneError for tied tensors: a task changes tensors by name and must not change
    others with them."""
    first: dict[int, str] = {}
    for path, tensor in model.state_dict(keep_vars=True).items():
        if (other := first.setdefault(id(tensor), path)) != path:
            raise BackboneError(
                f"backbone.model: given {name}, which uses one tensor under several names ({other},"
                f" {path}); expected a name per tensor, because tasks change tensors by name;"
                " choose another model"
            )


def _set_input_size(model: nn.Module, name: str, size_px: int) -> torch.Size:
    """Set the size; the shape of the features of one image."""
    set_input_size: Any = getattr(model, "set_input_size", None)
    try:
        if set_input_size is not None:
            set_input_size(img_size=(size_px, size_px))
        # Some networks keep tensors between passes; training cannot use those of inference mode.
        with torch.no_grad():
            features: torch.Tensor = model(torch.zeros(1, 3, size_px, size_px))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise BackboneError(
            f"input.size_px: given {size_px}, which {name} cannot take ({error}); choose a multiple"
            " of its patch size"
        ) from None
    return features.shape


def _check_features(shape: torch.Size, name: str, gives_maps: bool) -> None:
    if len(shape) == (4 if gives_maps else 2):
        return
    if gives_maps:
        raise BackboneError(
            f"backbone.model: {name} gives features of shape {list(shape)}; expected a map; choose"
            " another backbone for segmentation"
        )
    raise BackboneError(
        f"backbone.arguments: {name} gives features of shape {list(shape)}; expected one pooled"
        " vector; leave global_pool at its default"
    )
