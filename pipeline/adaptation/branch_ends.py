"""Read a block's residual stream, and change what a branch adds to it, with forward hooks, so that
the block's own code is untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeline.adaptation.blocks import Branch


class BranchStream:
    """The residual stream of a branch, as its block reads it in the pass under way."""

    def __init__(self, block: nn.Module, branch: Branch) -> None:
        self._read: torch.Tensor | None = None
        if branch.stream is not None:
            reader = block.get_submodule(branch.stream) if branch.stream else block
            reader.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._read = inputs[0]

    def take(self) -> torch.Tensor | None:
        """The stream, which is then forgotten; None where nothing reads it."""
        read, self._read = self._read, None
        return read


class BranchEnd:
    """Calls `change` on a branch's output in every forward pass and replaces the output by the
    result.

    The child where a branch ends may serve several branches (CaiT's drop path): its first call
    after the branch has started is the one. Changes of one branch are made in the order in which
    they were registered.
    """

    def __init__(
        self, block: nn.Module, branch: Branch, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._change, self._has_started = change, False
        block.get_submodule(branch.start).register_forward_hook(self._start)
        block.get_submodule(branch.end).register_forward_hook(self._end)

    def _start(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self._has_started = True

    def _end(
        self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        if not self._has_started:
            return output
        self._has_started = False
        return self._change(output)
