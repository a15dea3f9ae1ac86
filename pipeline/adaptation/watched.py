"""Observe one forward pass of a backbone, to learn what no type or name reveals.

A sample of seeded noise passes through a copy of the network that shares its tensors, so the
backbone itself is untouched, and hooks record each call. The findings hold for every sample,
because the networks are fixed programs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pipeline.backbones import LoadedBackbone

T = TypeVar("T")
_LOCK = threading.RLock()


def learnt_once(learn: Callable[[LoadedBackbone], T]) -> Callable[[LoadedBackbone], T]:
    """Decorator: cache a function of a backbone for the backbone's lifetime."""
    known: WeakKeyDictionary[nn.Module, T] = WeakKeyDictionary()

    @functools.wraps(learn)
    def recalled(backbone: LoadedBackbone) -> T:
        with _LOCK:
            if backbone.model not in known:
                known[backbone.model] = learn(backbone)
            return known[backbone.model]

    return recalled


@torch.no_grad()
def watch(backbone: LoadedBackbone, place_hooks: Callable[[nn.Module], None]) -> None:
    """One forward pass of a copy of the network, on which `place_hooks` has put its hooks."""
    model = backbone.fresh_model()
    place_hooks(model)
    model(backbone.takes.noise(1).to(next(model.parameters()).device))


def first_tensor(values: Any) -> torch.Tensor | None:
    """The first tensor among a call's arguments or results, None where there is none."""
    each = values if isinstance(values, tuple | list) else (values,)
    return next((value for value in each if isinstance(value, torch.Tensor)), None)
