"""The blocks before the first one that a recipe changes. Their outputs follow from the image alone,
so they can be computed once per image and kept.

The network is cut at the first module all of whose parameters come later. `outputs` runs it up to
there. `resume` runs it from there: the modules before the cut return zeros of their usual shapes,
which nothing reads, and the cut gets the given outputs instead. Legend: B images.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from pipeline.adaptation.depth import blocks_of, checked_block
from pipeline.adaptation.watched import watch
from pipeline.backbones import LoadedBackbone
from pipeline.utils.byte_cache import ByteCache

KEPT_BYTES = 2 << 30
FITS = 1e-3
"""Share of the largest output that rounding may change."""
KEPT: ByteCache[str, torch.Tensor] = ByteCache()
"""The outputs that this process keeps, of all its trunks, up to KEPT_BYTES: successive trials of a
study share them."""


class _CutReachedError(Exception):
    """Ends a pass at the cut."""


@dataclass(frozen=True)
class Cut:
    """Where a network is cut: the module whose first argument are the trunk's outputs, and what
    each module before it returns for one image.
    """

    module: str
    before: Mapping[str, Any]


def find_cut(backbone: LoadedBackbone, first_block: int) -> Cut:
    """The cut before block `first_block`.

    Raises:
        BackboneError: there is no such block.
    """
    blocks, first_block = blocks_of(backbone), checked_block(backbone, first_block)
    called: list[str] = []
    returned: dict[str, Any] = {}
    is_late = _outermost(
        backbone.model, {name: block >= first_block for name, block in blocks.items()}
    )

    def place_hooks(model: nn.Module) -> None:
        for name in is_late:
            model.get_submodule(name).register_forward_hook(_noting(name, called, returned))

    watch(backbone, place_hooks)
    before = list(itertools.takewhile(lambda name: not is_late[name], called))
    return Cut(called[len(before)], {name: returned[name] for name in before})


def _outermost(model: nn.Module, is_late: Mapping[str, bool]) -> dict[str, bool]:
    """The outermost modules whose parameters all come before the cut, or all after it: which."""
    found: dict[str, bool] = {}
    for name, module in itertools.islice(model.named_modules(), 1, None):
        inside = {is_late[f"{name}.{own}"] for own, _ in module.named_parameters()}
        is_inner = any(name.startswith(f"{outer}.") for outer in found)
        if len(inside) == 1 and not is_inner:
            found[name] = inside.pop()
    return found


def _noting(name: str, called: list[str], returned: dict[str, Any]) -> Callable[..., None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        called.append(name)
        returned[name] = output

    return note


class Trunk:
    """The part of `network` before block `first_block`; it stays a part of the network.

    Args:
        network: a fresh model of `backbone`, with or without parts in the later blocks.

    Raises:
        BackboneError: there is no such block.
    """

    def __init__(self, network: nn.Module, backbone: LoadedBackbone, first_block: int) -> None:
        cut = find_cut(backbone, first_block)
        self._shape = backbone.takes.shape
        self._key = f"{backbone.fingerprint} {backbone.takes} {first_block}"
        self._given: torch.Tensor | None = None
        self._reached: torch.Tensor | None = None
        self._is_ending = False
        self._cut_module = network.get_submodule(cut.module)
        self._cut_module.register_forward_pre_hook(self._at_cut, prepend=True)
        for name, returned in cut.before.items():
            module = network.get_submodule(name)
            module.forward = self._skipping(module.forward, returned)

    def _at_cut(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._is_ending:
            self._reached = inputs[0]
            raise _CutReachedError
        return None if self._given is None else (self._given, *inputs[1:])

    def _skipping(self, forward: Callable[..., Any], returned: Any) -> Callable[..., Any]:
        def zeros(of_one: torch.Tensor) -> torch.Tensor:
            assert self._given is not None
            shape = (len(self._given), *of_one.shape[1:])
            return self._given.new_zeros(shape)

        def run(*arguments: Any, **named: Any) -> Any:
            if self._given is None:
                return forward(*arguments, **named)
            return tree_map_only(torch.Tensor, zeros, returned)

        return run

    def resume(
        self, network: Callable[[torch.Tensor], torch.Tensor], outputs: torch.Tensor
    ) -> torch.Tensor:
        """What the network, which contains the trunk, returns for images with these `outputs`
        [B, ...].
        """
        self._given = outputs
        try:
            return network(outputs.new_zeros(len(outputs), *self._shape))
        finally:
            self._given = None

    def reach(self, network: Callable[[torch.Tensor], Any], images: torch.Tensor) -> torch.Tensor:
        """What reaches the cut, [B, ...], of what the network, which contains the trunk, takes."""
        self._is_ending = True
        try:
            with contextlib.suppress(_CutReachedError):
                network(images)
        finally:
            self._is_ending = False
        reached, self._reached = self._reached, None
        assert reached is not None
        return reached

    def fits(self, network: Callable[[torch.Tensor], torch.Tensor], samples: torch.Tensor) -> bool:
        """Whether a pass that goes on from the trunk's outputs gives what a whole one gives.

        It does not where later blocks read more of the earlier ones than the output of the last
        one: those of a point transformer read the groups' positions.
        """
        whole = network(samples)
        resumed = self.resume(network, self.reach(network, samples))
        return torch.allclose(whole, resumed, rtol=0, atol=FITS * float(whole.abs().max()))

    @torch.inference_mode(False)
    @torch.no_grad()
    def outputs(self, network: Callable[[torch.Tensor], Any], images: torch.Tensor) -> torch.Tensor:
        """What reaches the cut, [B, ...], of uint8 images [B, 3, S, S] on the CPU; computed only
        for images whose outputs this process has not kept.

        On a CPU, images pass one by one, so that an output does not depend on the batch in which
        its image comes first.

        Args:
            network: contains the trunk; it takes uint8 images.
        """
        keys = [self._key_of(image) for image in images]
        found = [KEPT.get(key) for key in keys]
        missing = [number for number, outputs in enumerate(found) if outputs is None]
        for number, outputs in zip(missing, self._computed(network, images, missing), strict=True):
            found[number] = outputs
            KEPT.put(keys[number], outputs, outputs.nbytes)
        KEPT.trim(KEPT_BYTES)
        return torch.stack([outputs for outputs in found if outputs is not None])

    def _computed(
        self, network: Callable[[torch.Tensor], Any], images: torch.Tensor, numbers: list[int]
    ) -> Iterator[torch.Tensor]:
        one_by_one = self._device().type == "cpu"
        groups = [[number] for number in numbers] if one_by_one else [numbers] if numbers else []
        for group in groups:
            yield from self.reach(network, images[group]).clone()

    def _device(self) -> torch.device:
        return next(self._cut_module.parameters()).device

    def _key_of(self, image: torch.Tensor) -> str:
        device = self._device()
        low = torch.is_autocast_enabled(device.type)
        digest = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).hexdigest()
        return f"{self._key} {device} {'bf16' if low else 'fp32'} {digest}"
