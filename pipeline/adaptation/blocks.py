"""Find blocks with an MLP, and where their branches begin and end, from what each block computes
in one forward pass.

    y = s + e        s: the residual stream, e: what the branch adds to it, y: what is read next

A branch ends at the child of its block whose output is e: its MLP or attention itself, or the
LayerScale, norm or drop path after it. It is identified by value: s + e, for an s seen before, is
bit for bit what a later child reads or the block returns. So norms may come first or last, and a
child may serve several branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.adaptation.channels import channel_dims
from pipeline.adaptation.sites import is_norm
from pipeline.adaptation.watched import first_tensor, learnt_once, watch
from pipeline.backbones import LoadedBackbone

ROUNDING = 1e-5
"""Relative tolerance between two sums over the same values, as a fraction of their absolute sum.
"""


@dataclass(frozen=True)
class Branch:
    """`end` is the child whose output is added to the stream, the first time it is called after
    `start`; both have the same shape.

    stream: the child whose input is the residual stream, "" for the block itself, None where no
    child reads it.
    """

    start: str
    end: str
    stream: str | None
    channels_first: bool


@dataclass(frozen=True)
class MlpSlot:
    """A block with an MLP next to a norm. Children are named relative to the block; a branch is
    None where the block has none whose end is known.
    """

    block: str
    norm: str
    width: int
    channels_first: bool
    mlp: Branch | None
    attention: Branch | None


@learnt_once
def mlp_slots(backbone: LoadedBackbone) -> list[MlpSlot]:
    """Every block with an `mlp` and a norm next to it: before it (ViT, Swin, ConvNeXt) or, in
    post-norm blocks (SwinV2), after it.
    """
    watches: dict[str, BlockWatch] = {}

    def place_hooks(model: nn.Module) -> None:
        for name, block in model.named_modules():
            if _first_layer(getattr(block, "mlp", None)) is not None:
                watches[name] = BlockWatch(block)

    watch(backbone, place_hooks)
    slots = [_slot(backbone, name, block) for name, block in watches.items()]
    return [slot for slot in slots if slot is not None]


def _first_layer(module: nn.Module | None) -> nn.Linear | nn.Conv2d | None:
    return next(
        (
            layer
            for layer in (module.modules() if module is not None else ())
            if isinstance(layer, nn.Linear | nn.Conv2d)
        ),
        None,
    )


def _slot(backbone: LoadedBackbone, name: str, watched: BlockWatch) -> MlpSlot | None:
    block = backbone.model.get_submodule(name)
    first, mlp, norm = (
        _first_layer(block.get_submodule("mlp")),
        watched.call_of("mlp"),
        watched.neighbouring_norm("mlp"),
    )
    if (
        first is None
        or mlp is None
        or norm is None
        or mlp.read.numbers.shape != mlp.given.numbers.shape
    ):
        return None
    channels_first = isinstance(first, nn.Conv2d)

    def reads_channels_first(child: str | None) -> bool:
        within = ".".join(part for part in (name, child) if part) + "."
        dims = [
            dim for layer, dim in channel_dims(backbone).items() if f"{layer}.".startswith(within)
        ]
        return dims[0] != -1 if child is not None and dims else channels_first

    width = int(mlp.read.numbers.shape[1 if channels_first else -1])
    branches = {
        start: watched.branch(start, width, reads_channels_first) for start in ("mlp", "attn")
    }
    return MlpSlot(name, norm, width, channels_first, branches["mlp"], branches["attn"])


@dataclass(frozen=True)
class Seen:
    """A tensor that was passed, with its sum and absolute sum: a cheap check that rules out most
    candidates without adding the tensors.
    """

    numbers: torch.Tensor
    total: float
    size: float

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Seen:
        """Copied, since a later module may write into it."""
        exact = tensor.double()
        return cls(tensor.clone(), float(exact.sum()), float(exact.abs().sum()))


@dataclass(frozen=True)
class Call:
    """One call of a block's child."""

    child: str
    read: Seen
    given: Seen


class BlockWatch:
    """Records the tensors passed between the children of one block during its first call."""

    def __init__(self, block: nn.Module) -> None:
        self._norms = {name for name, child in block.named_children() if is_norm(child)}
        self.calls: list[Call] = []
        self.arguments: list[Seen] = []
        self.result: Seen | None = None
        self._is_over = False
        for name, child in block.named_children():
            child.register_forward_hook(self._recorder(name), with_kwargs=True)
        block.register_forward_pre_hook(self._begin, with_kwargs=True)
        block.register_forward_hook(self._finish)

    def _recorder(self, name: str) -> Any:
        def record(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            read, given = first_tensor((*inputs, *named.values())), first_tensor(output)
            if not self._is_over and read is not None and given is not None:
                self.calls.append(Call(name, Seen.of(read), Seen.of(given)))

        return record

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not self._is_over:
            self.arguments = [
                Seen.of(value)
                for value in (*inputs, *named.values())
                if isinstance(value, torch.Tensor)
            ]

    def _finish(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        result = first_tensor(output)
        if not self._is_over and result is not None:
            self.result = Seen.of(result)
        self._is_over = True

    def call_of(self, child: str) -> Call | None:
        """The call of a child; None where there is none, or several."""
        calls = [call for call in self.calls if call.child == child]
        return calls[0] if len(calls) == 1 else None

    def neighbouring_norm(self, child: str) -> str | None:
        """The norm whose output a child reads or, failing that, the one that reads the child's
        output.
        """
        middle = self.call_of(child)
        norms = [call for call in self.calls if call.child in self._norms]
        before = [
            call.child
            for call in norms
            if middle is not None and _is_same(call.given.numbers, middle.read.numbers)
        ]
        after = [
            call.child
            for call in norms
            if middle is not None and _is_same(call.read.numbers, middle.given.numbers)
        ]
        return next(iter([*before[::-1], *after]), None)

    def branch(
        self, start: str, width: int, reads_channels_first: Callable[[str | None], bool]
    ) -> Branch | None:
        """The branch that starts with a child, which is called once; None if its end cannot be
        determined.

        Args:
            reads_channels_first: whether a child ("" for the block) puts channels at dimension 1,
                called if the shapes are ambiguous.
        """
        if self.call_of(start) is None or self.result is None:
            return None
        first = next(number for number, call in enumerate(self.calls) if call.child == start)
        read_later = [call.read for call in self.calls[first + 1 :]] + [self.result]
        possible = (
            (call, reader)
            for number, total in enumerate(read_later, first + 1)
            for call in reversed(self.calls[first:number])
            for reader, stream in self._streams(first)
            if _is_sum(stream, call.given, total)
        )
        end, reader = next(possible, (None, None))
        if end is None:
            return None
        return Branch(
            start,
            end.child,
            reader,
            _has_channels_first(end.given.numbers, width, partial(reads_channels_first, reader)),
        )

    def _streams(self, first: int) -> Sequence[tuple[str | None, Seen]]:
        """Candidates for the stream of a branch that starts with call `first`, latest first, each
        with the child that reads it.

        A child may also scale the stream (MetaFormer): then its output is the term of the sum.
        """
        before = self.calls[: first + 1]
        read = [(call.child, call.read) for call in reversed(before)]
        scaled = [
            (call.child, call.given)
            for call in reversed(before[:-1])
            if call.given.numbers.shape == call.read.numbers.shape
        ]
        arguments = [
            ("" if number == 0 else None, argument)
            for number, argument in enumerate(self.arguments)
        ]
        return [*read, *arguments, *scaled]


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.reshape(other.shape), other)


def _is_sum(stream: Seen, added: Seen, total: Seen) -> bool:
    """Whether `total` is the sum, with its channels in either position; a stream of zeros does not
    count.
    """
    may_be = stream.size > 0 and abs(stream.total + added.total - total.total) <= ROUNDING * (
        stream.size + added.size
    )
    if not may_be or not stream.numbers.numel() == added.numbers.numel() == total.numbers.numel():
        return False
    found = stream.numbers.reshape(added.numbers.shape) + added.numbers
    layouts = (total.numbers, total.numbers.movedim(1, -1), total.numbers.movedim(-1, 1))
    return any(torch.equal(found, layout.reshape(found.shape)) for layout in layouts)


def _has_channels_first(added: torch.Tensor, width: int, otherwise: Callable[[], bool]) -> bool:
    """Whether a branch's output has its channels at dimension 1; `otherwise` is called if the shape
    is ambiguous.
    """
    if added.ndim > 2 and added.shape[1] == added.shape[-1]:
        return otherwise()
    return added.ndim > 2 and added.shape[1] == width
