"""Activation checkpointing (arXiv 1604.06174): a block keeps its inputs alone and computes the rest
again in the backward pass, so that memory is that of one block.

The second computation draws the same random numbers, from generators that are set back for it, and
runs to its end, so that hooks leave everything as the first did.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pipeline.adaptation.dropout import SeededDropout

_thread = threading.local()


def is_recomputing() -> bool:
    """Whether this thread computes a block for the second time."""
    return getattr(_thread, "is_recomputing", False)


def outside_blocks() -> contextlib.AbstractContextManager[None]:
    """Context manager: keep what is computed for the backward pass, as other blocks use it too."""
    return torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)


def recompute_blocks(blocks: Iterable[nn.Module], dropouts: Sequence[SeededDropout]) -> None:
    """Have each block computed again in the backward pass. `dropouts`: those that blocks use."""
    for block in blocks:
        block.forward = _recomputed(block.forward, dropouts)


def _recomputed(
    forward: Callable[..., Any], dropouts: Sequence[SeededDropout]
) -> Callable[..., Any]:
    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        device = next(each.device for each in inputs if isinstance(each, torch.Tensor))
        generators = [each.generator(device) for each in dropouts]
        states = [generator.get_state() for generator in generators]

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), _second_time(generators, states)

        with set_checkpoint_early_stop(False):
            return checkpoint(
                forward,
                *inputs,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=contexts,
                **named,
            )

    return run


@contextlib.contextmanager
def _second_time(
    generators: Sequence[torch.Generator], states: Sequence[torch.Tensor]
) -> Iterator[None]:
    """Context manager: the generators are as they were the first time."""
    now = [generator.get_state() for generator in generators]
    _thread.is_recomputing = True
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    try:
        yield
    finally:
        _thread.is_recomputing = False
        for generator, state in zip(generators, now, strict=True):
            generator.set_state(state)
