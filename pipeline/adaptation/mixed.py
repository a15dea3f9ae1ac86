"""One network in memory that samples of many packs pass in one batch.

Each part says whether and how (`Part.mix`); the network is the plain backbone plus what the parts
hook in, and its own copy of the tensors. Packs that cannot pass together pass one after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

import pipeline.adaptation.parts  # noqa: F401 - registers the parts
from pipeline.adaptation.flat import FlatPack
from pipeline.adaptation.head import mixed_logits
from pipeline.adaptation.lanes import MixedBatch
from pipeline.adaptation.part import PARTS, Mixing, SharedNetwork, Site, Stage, parts_of
from pipeline.adaptation.sites import tunable_layers
from pipeline.adaptation.trunk import Trunk
from pipeline.adaptation.watched import learnt_once
from pipeline.backbones import LoadedBackbone
from pipeline.specs import Recipe
from pipeline.utils.devices import autocast

_REPLACING = (Stage.WEIGHTS, Stage.NORMS)
"""Stages whose parts replace modules: they come first, so that hooks are on the new ones."""


class MixedNetwork:
    """A backbone for the samples of many packs. Not thread-safe: one pass at a time."""

    def __init__(self, backbone: LoadedBackbone, device: str | torch.device = "cpu") -> None:
        model = backbone.fresh_model().to(device)
        for tensor in model.parameters():
            tensor.data = tensor.data.clone(
                memory_format=torch.contiguous_format
            )  # written to in every pass
        self._backbone, self._trunks = backbone, dict[int, Trunk | None]()
        self._network = SharedNetwork(Site(backbone, Recipe()), model.eval())
        self._normalise = backbone.takes.normaliser().to(device)
        order = sorted(PARTS.values(), key=lambda part: (part.stage not in _REPLACING, part.stage))
        self._gives_maps = backbone.gives_maps
        mixes = not backbone.gives_maps and keeps_samples_together(backbone)
        self._mixing = {
            part.name: part.mix(self._network) if mixes else Mixing.APART for part in order
        }

    def can_mix(self, recipe: Recipe) -> bool:
        """Whether packs of this recipe can share a pass with others of it."""
        parts = [part.name for part, _ in parts_of(recipe)]
        return not self._gives_maps and all(
            self._mixing[name] is not Mixing.APART for name in parts
        )

    @torch.inference_mode()
    def logits(
        self,
        images: torch.Tensor,
        packs: Sequence[FlatPack],
        owners: Sequence[int],
        sources: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[torch.Tensor]:
        """Logits [C], float32, of each sample by its own pack.

        Args:
            images: uint8 [I, 3, S, S] on the network's device.
            packs: of recipes that can be mixed.
            owners: which of `packs` each sample belongs to.
            sources: which of the images each sample is; None for one sample per image, in order.
                The blocks that no pack of an image changes are computed once for it.
            dtype: of the products, as `AdaptedModel.merge`.
        """
        sources = range(len(images)) if sources is None else sources
        found: list[torch.Tensor | None] = [None] * len(owners)
        for numbers in self._passes(packs, owners, has_repeats=len(images) < len(owners)):
            images_of = [sources[at] for at in numbers]
            owners_of = [owners[at] for at in numbers]
            with autocast(images.device, dtype):
                features, batch = self._features(images, images_of, packs, owners_of)
            heads = [pack.parts["head"] for pack in batch.packs]
            pass_logits = mixed_logits(features.float(), heads, batch.owners)
            for number, each in zip(numbers, pass_logits, strict=True):
                found[number] = each
        return [each for each in found if each is not None]

    def _passes(
        self, packs: Sequence[FlatPack], owners: Sequence[int], has_repeats: bool
    ) -> list[list[int]]:
        """The samples of each pass, ordered by pack; packs that leave all weights alone first.
        Where images are repeated, late packs pass apart, because they share a trunk.
        """
        alike = [name for name, mixing in self._mixing.items() if mixing is Mixing.ALIKE]
        passes: dict[Hashable, list[int]] = defaultdict(list)
        rank = {
            owner: ("connections" in packs[owner].parts, owner) for owner in dict.fromkeys(owners)
        }
        for sample in sorted(range(len(owners)), key=lambda at: rank[owners[at]]):
            parts = packs[owners[sample]].parts
            is_late = has_repeats and packs[owners[sample]].from_block > 0
            structures = (parts[name].structure if name in parts else None for name in alike)
            passes[(is_late, *structures)].append(sample)
        return list(passes.values())

    def _features(
        self,
        images: torch.Tensor,
        sources: Sequence[int],
        packs: Sequence[FlatPack],
        owners: Sequence[int],
    ) -> tuple[torch.Tensor, MixedBatch]:
        """The features [B, D] of the samples of one pass, and their batch."""
        used = list(dict.fromkeys(owners))
        place = {owner: number for number, owner in enumerate(used)}
        batch = MixedBatch([packs[owner] for owner in used], [place[owner] for owner in owners])
        distinct = sorted(set(sources))
        rows = torch.tensor([distinct.index(each) for each in sources], device=images.device)
        inputs = self._normalise(images[torch.tensor(distinct)])
        first_block = min(pack.from_block for pack in batch.packs)
        is_shared = len(distinct) < len(sources) and first_block > 0
        trunk = self._trunk(first_block) if is_shared else None
        reached = inputs if trunk is None else trunk.reach(self._network.model, inputs)
        self._network.batch = batch
        try:
            if trunk is None:
                features = self._network.model(inputs[rows])
            else:
                features = trunk.resume(self._network.model, reached[rows])
        finally:
            self._network.batch = None
        return features, batch

    def _trunk(self, first_block: int) -> Trunk | None:
        """The blocks before one, as a part of the network that can be computed alone; None where
        later blocks read more of them than the output of the last one.
        """
        if first_block not in self._trunks:
            trunk = Trunk(self._network.model, self._backbone, first_block)
            samples = self._backbone.takes.noise(1).to(
                next(self._network.model.parameters()).device
            )
            self._trunks[first_block] = trunk if trunk.fits(self._network.model, samples) else None
        return self._trunks[first_block]


@learnt_once
@torch.no_grad()
def keeps_samples_together(backbone: LoadedBackbone) -> bool:
    """Whether in every layer the rows of an image are consecutive in the first dimension, as mixed
    batches need: each half of a batch of two images is what an image alone gives.
    """
    model, read = backbone.fresh_model(), []
    for layer in tunable_layers(model).values():
        layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    images = backbone.takes.noise(2).to(next(model.parameters()).device)
    model(images)
    both, read[:] = list(read), []
    model(images[:1])
    first = list(read)
    return len(both) == len(first) and all(
        len(two) == 2 * len(one) and torch.allclose(two[: len(one)], one, rtol=1e-3, atol=1e-4)
        for two, one in zip(both, first, strict=True)
    )
