"""Models that are not in timm's registry: `local-dir:FOLDER` and `hf-hub:OWNER/NAME`, as timm saves
them.

Both hold `config.json` and `model.safetensors`. They become a backbone of timm's registry with the
weights of a file, so that packs and workers need neither the folder nor the hub. Only safetensors
is accepted: other formats may run code when they are read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import timm
from pydantic import ValidationError
from timm.models._hub import load_model_config_from_path

from pipeline.backbones.hub import SAFE_WEIGHTS, hub_file
from pipeline.errors import BackboneError
from pipeline.specs import Backbone

_NO_ARGUMENT = ("num_classes", "in_chans")
"""Saved arguments that concern the classifier, or that this package sets itself."""


def resolve_source(spec: Backbone) -> Backbone:
    """Resolve a backbone to its name in timm's registry, with the arguments that a folder or hub
    repository states.

    Raises:
        BackboneError: nothing there can be read, or not safely.
    """
    source, _, place = spec.model.partition(":")
    if source == "hf-hub" and place:
        spec = _from_folder(spec, hub_file(place, "config.json").parent, place)
    elif source == "local-dir" and place:
        spec = _from_folder(spec, Path(place).expanduser(), None)
    elif re.search(r"[/\\:]", spec.model):
        raise BackboneError(
            f"backbone.model: given {spec.model!r}; expected {_expected(spec.model)}"
        )
    if spec.weights in ("pretrained", "random"):
        return spec
    return spec.model_copy(update={"weights": str(_weights_file(spec.weights))})


def _expected(model: str) -> str:
    name = model.rpartition("/")[2]
    known = (
        f"{name!r}, which is timm's own name of it, or "
        if timm.is_model(name)
        else "a name such as 'vit_small_patch16_224.augreg_in21k', "
    )
    return (
        f"{known}'hf-hub:OWNER/NAME' for a model on the Hugging Face hub, or 'local-dir:FOLDER' for"
        " a folder that timm saved"
    )


def _from_folder(spec: Backbone, folder: Path, repository: str | None) -> Backbone:
    config, model, arguments = _read_config(folder)
    weights = spec.weights
    if weights == "pretrained":
        weights = str(
            _safetensors_in(folder) if repository is None else hub_file(repository, SAFE_WEIGHTS)
        )
    default: Any = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    size = (config.get("input_size") or (3, 0, 0))[-1]
    if (
        default is not None
        and config.get("fixed_input_size")
        and size not in (0, default.input_size[-1])
    ):
        arguments.setdefault("img_size", size)
    if config.get("global_pool"):
        arguments.setdefault("global_pool", config["global_pool"])
    given = {"model": model, "arguments": {**arguments, **spec.arguments}, "weights": weights}
    try:
        return Backbone.model_validate(
            {**given, "mean": spec.mean or config.get("mean"), "std": spec.std or config.get("std")}
        )
    except ValidationError as error:
        fault = error.errors()[0]
        raise BackboneError(
            f"backbone.model: config.json in {folder} has {'.'.join(map(str, fault['loc']))}, which"
            f" cannot be used: {fault['msg']}"
        ) from None


def _read_config(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    try:
        config, model, arguments = load_model_config_from_path(folder)
    except FileNotFoundError:
        raise BackboneError(
            f"backbone.model: {folder} has no config.json; expected a folder that timm saved. For"
            " any other checkpoint, name timm's model as `model` and the file as `weights`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise BackboneError(
            f"backbone.model: config.json in {folder} does not describe a timm model; expected what"
            " timm saves"
        ) from None
    return (
        config,
        model,
        {name: value for name, value in arguments.items() if name not in _NO_ARGUMENT},
    )


def _weights_file(weights: str) -> Path:
    """The checkpoint that a task file names: a file, or a folder with one."""
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", weights):
        raise BackboneError(
            f"backbone.weights: given {weights!r}; expected 'pretrained', 'random' or a path:"
            " download the file and give its path, or give a model on the Hugging Face hub as"
            " `model: hf-hub:OWNER/NAME`"
        )
    path = Path(weights).expanduser()
    return _safetensors_in(path) if path.is_dir() else path


def _safetensors_in(folder: Path) -> Path:
    files = (
        [folder / SAFE_WEIGHTS]
        if (folder / SAFE_WEIGHTS).is_file()
        else sorted(folder.glob("*.safetensors"))
    )
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} safetensors files" if files else "no safetensors file"
    raise BackboneError(
        f"backbone.weights: {folder} has {found}; expected {SAFE_WEIGHTS}, or give the path of one"
        " file as `weights`"
    )
