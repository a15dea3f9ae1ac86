"""Reading a local checkpoint the way timm reads its own.

Every timm architecture has a filter that rewrites a checkpoint for the model: it
resamples position embeddings, window tables and patch kernels of another size, and renames the
tensors of the original layouts (SAM, DINO, Swin, CLIP, ...). The filter is not public, so it
is captured when timm passes it to its loader, while the model is built. Only safetensors files are
read: they hold numbers, no code.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import _builder, clean_state_dict
from torch import nn

from pipeline.backbones.segment_anything import in_meta_layout
from pipeline.errors import BackboneError

State = dict[str, torch.Tensor]
Filter = Callable[..., Mapping[str, torch.Tensor]]

_COUNTER = "num_batches_tracked"
"""BatchNorm's count of training batches, which inference never reads and many checkpoints leave
out.
"""

_KINDS = {
    b"version https://git-lfs": (
        "a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    ),
    b"PK\x03\x04": "a PyTorch or NumPy archive, which may run code when it is read",
    b"\x80": "a Python pickle, which may run code when it is read",
    b"<": "a web page; download the file itself",
}
_CONVERT = (
    '; convert it once, where you trust it: python -c "import torch; from safetensors.torch import'
    " save_file; save_file(torch.load('{name}', weights_only=True), '{stem}.safetensors')\""
)


@contextlib.contextmanager
def weights_held_back() -> Iterator[list[Filter]]:
    """Within this context, timm builds a pretrained model without its weights; yields a list that
    receives the model's checkpoint filter.
    """
    filters: list[Filter] = []
    caller, load_pretrained = threading.get_ident(), _builder.load_pretrained

    def keep_filter(*args: Any, filter_fn: Filter | None = None, **kwargs: Any) -> None:
        if threading.get_ident() != caller:
            load_pretrained(*args, filter_fn=filter_fn, **kwargs)
        elif filter_fn is not None:
            filters.append(filter_fn)

    _builder.load_pretrained = keep_filter
    try:
        yield filters
    finally:
        _builder.load_pretrained = load_pretrained


def read_checkpoint(model: nn.Module, path: Path, checkpoint_filter: Filter | None) -> None:
    """Set every tensor of `model` from the file, through timm's filter where names or shapes differ
    from the model's.

    Raises:
        BackboneError: no such file, another format, or tensors that are missing, unknown or
            misshapen after the filter.
    """
    expected = model.state_dict()
    given = _without_classifier(in_meta_layout(clean_state_dict(_read_tensors(path))), model)
    faults = _misfits(expected, given)
    if faults and checkpoint_filter is not None:
        given = _without_classifier(_filtered(given, model, checkpoint_filter, path), model)
        faults = _misfits(expected, given)
    if faults:
        raise BackboneError(
            f"backbone.weights: {path} does not fit {type(model).__name__} as configured:"
            f" {'; '.join(faults)}"
        )
    counters = {name: tensor for name, tensor in expected.items() if name.endswith(_COUNTER)}
    state = {
        **counters,
        **{name: tensor.to(expected[name].dtype) for name, tensor in given.items()},
    }
    model.load_state_dict(state, assign=True)


def _read_tensors(path: Path) -> State:
    if not path.is_file():
        raise BackboneError(
            f"backbone.weights: given {str(path)!r}, no such file; give a safetensors checkpoint,"
            " 'pretrained' or 'random'"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"backbone.weights: {path} {_what_it_is(path, error)}") from None


def _what_it_is(path: Path, error: Exception) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(64).lstrip()
        for magic, kind in _KINDS.items():
            if start.startswith(magic):
                way_out = (
                    _CONVERT.format(name=path.name, stem=path.stem) if "run code" in kind else ""
                )
                return f"is {kind}{way_out}"
    return f"is not a readable safetensors file ({error}); download it again"


def _filtered(given: State, model: nn.Module, checkpoint_filter: Filter, path: Path) -> State:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of timm's own code
            return dict(checkpoint_filter(dict(given), model))
    except (
        AttributeError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
    ) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        faults = "; ".join(_misfits(model.state_dict(), given))
        raise BackboneError(
            f"backbone.weights: {path} does not fit {type(model).__name__} as configured: {faults};"
            f" timm cannot convert it ({what})"
        ) from None


def _without_classifier(state: Mapping[str, torch.Tensor], model: nn.Module) -> State:
    """The state without the classifier, and without what surrounds it (LeViT's BatchNorm, say)
    where the model has nothing there.
    """
    config: Any = model.pretrained_cfg
    classifier = config.get("classifier") or ()
    expected, prefixes = model.state_dict(), []
    for name in (classifier,) if isinstance(classifier, str) else classifier:
        parent = f"{name.rpartition('.')[0]}."
        prefixes.append(
            f"{name}."
            if parent == "." or any(path.startswith(parent) for path in expected)
            else parent
        )
    return {name: tensor for name, tensor in state.items() if not name.startswith(tuple(prefixes))}


def _misfits(expected: State, given: State) -> list[str]:
    missing = sorted(name for name in expected.keys() - given.keys() if not name.endswith(_COUNTER))
    surplus = sorted(given.keys() - expected.keys())
    reshaped = [
        name
        for name in sorted(expected.keys() & given.keys())
        if expected[name].shape != given[name].shape
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unknown", surplus))
        if names
    ]
    return faults + [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in reshaped[:3]
    ]
