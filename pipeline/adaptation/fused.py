"""Find the fused `qkv` layers that hold q, k and v as consecutive thirds of their rows, rather than
head by head.

In one forward pass the layer's output is replaced by its row numbers, and traced through views
and copies to the first computation: there, a tensor of q, k or v alone holds the rows of one
third.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.adaptation.sites import tunable_layers
from pipeline.adaptation.watched import learnt_once, watch
from pipeline.backbones import LoadedBackbone

_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
_VIEWS = (torch.ops.aten._unsafe_view.default,)
"""Views that torch does not list as such: reshaping makes one of a copy."""


@learnt_once
def in_thirds(backbone: LoadedBackbone) -> Mapping[str, bool]:
    """For every `qkv` layer by name: whether q, k and v are its thirds. They are in attention that
    adds a separate bias to each (BEiT).
    """
    layers = {
        name: layer
        for name, layer in tunable_layers(backbone.model).items()
        if name.rpartition(".")[2] == "qkv"
    }
    owners = {name: backbone.model.get_submodule(name.rpartition(".")[0]) for name in layers}
    known = {
        name: True
        for name, owner in owners.items()
        if isinstance(getattr(owner, "q_bias", None), nn.Parameter)
    }
    unknown = layers.keys() - known.keys()
    if not unknown:
        return known
    with _Followed() as followed:
        watch(backbone, partial(_number_rows, names=unknown, followed=followed))
    return {name: known.get(name, followed.is_in_thirds.get(name, False)) for name in layers}


def _number_rows(model: nn.Module, names: set[str], followed: _Followed) -> None:
    for name in names:
        model.get_submodule(name).register_forward_hook(partial(followed.begin, name))


class _Followed(TorchDispatchMode):
    """Follows row numbers to the first computation with them. `is_in_thirds` says, by layer,
    whether each tensor there was of one third.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_in_thirds: dict[str, bool] = {}
        # By storage: its layer and the rows of a third. A weak reference keeps its address from
        # being given to another.
        self._followed: dict[int, tuple[StorageWeakRef, str, int]] = {}

    def begin(
        self, name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Hook of a layer: its output is the numbers of its rows from here on."""
        dim = 1 if isinstance(module, nn.Conv2d) else -1
        rows = output.shape[dim]
        numbers = (
            torch.arange(rows, dtype=output.dtype, device=output.device)
            .expand(output.movedim(dim, -1).shape)
            .movedim(-1, dim)
            .contiguous()
        )
        self._follow(numbers, name, rows // 3)
        return numbers

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        read = list(self._read(args, kwargs))
        is_computation = function not in (*_COPIES, *_VIEWS) and (
            function._schema.is_mutable or not function.is_view
        )
        for tensor, name, third in read if is_computation else ():
            self.is_in_thirds[name] = (
                self.is_in_thirds.get(name, True) and len((tensor.detach() // third).unique()) == 1
            )
        result = function(*args, **(kwargs or {}))
        for tensor, name, third in read:
            if function in _COPIES:
                self._follow(result, name, third)
            elif function._schema.is_mutable:
                del self._followed[tensor.untyped_storage()._cdata]
        return result

    def _read(self, *arguments: Any) -> Iterator[tuple[torch.Tensor, str, int]]:
        """The tensors among a function's arguments in which rows are followed, with the layer and
        the rows of a third.
        """
        for value in tree_leaves(arguments):
            found = (
                self._followed.get(value.untyped_storage()._cdata)
                if isinstance(value, torch.Tensor)
                else None
            )
            if found is not None:
                yield value, found[1], found[2]

    def _follow(self, tensor: torch.Tensor, name: str, third: int) -> None:
        self._followed[tensor.untyped_storage()._cdata] = (
            StorageWeakRef(tensor.untyped_storage()),
            name,
            third,
        )
