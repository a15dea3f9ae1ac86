"""Many packs on one backbone: images of any of them are predicted in one pass."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.adaptation.flat import FlatPack, flatten
from pipeline.adaptation.mixed import MixedNetwork
from pipeline.adaptation.packing import PROBES, check_probe, from_pack
from pipeline.adaptation.unpacking import decode
from pipeline.backbones import LoadedBackbone
from pipeline.errors import PackError
from pipeline.packs import content_digest, read_pack
from pipeline.serving.answers import answers
from pipeline.serving.predictor import PREDICT_BATCH, Sample, decoded, kind_of
from pipeline.serving.residency import ResidentPack, ResidentPacks
from pipeline.utils.devices import choose_device, exact_float32

CAPACITY_BYTES = 512 * 1024**2
"""Memory for packs: a thousand and more of most."""


class PackHost:
    """A backbone and the packs on it.

    Predictions are those of each pack alone, up to the rounding of float32. Packs whose parts
    cannot share a pass, such as full fine-tuning, pass one after the other.

    Args:
        read: the content of the pack file of a name.
        device: None takes the GPU, where there is one.
        capacity_bytes: memory for packs; the least recently used are read again when asked for.
    """

    def __init__(
        self,
        backbone: LoadedBackbone,
        read: Callable[[str], bytes],
        *,
        device: str | None = None,
        capacity_bytes: int = CAPACITY_BYTES,
    ) -> None:
        self.backbone, self.device = backbone, choose_device(device)
        self._read = read
        self._network = MixedNetwork(backbone, self.device)
        self._one_pass_at_a_time = threading.Lock()
        self._probed = set[str]()  # the digests of packs whose probe images were checked
        self.packs = ResidentPacks(self._load, capacity_bytes)

    def predict(self, requests: Sequence[tuple[str, Sample]]) -> list[dict[str, Any]]:
        """What each pack says of its image, as `Predictor.predict`; requests are pairs of a pack's
        name and an image.

        Raises:
            DataError: something is no image; `request 3` is the fourth of these.
            PackError: a pack cannot be used on this backbone.
        """
        packs = {name: self.packs.get(name) for name in dict.fromkeys(name for name, _ in requests)}
        images: dict[int, np.ndarray] = {}  # by identity: an image for many packs is decoded once
        for number, (_, image) in enumerate(requests):
            if id(image) not in images:
                images[id(image)] = decoded(image, number, self.backbone.takes, "request")
        return self.predict_decoded(
            [packs[name] for name, _ in requests], [images[id(image)] for _, image in requests]
        )

    def predict_decoded(
        self, packs: Sequence[ResidentPack], images: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """What each pack says of its image, as it is decoded. Of an array that is given for many
        packs, the blocks that none of them changes are computed once.
        """
        predictions = []
        for start in range(0, len(images), PREDICT_BATCH):
            rows = slice(start, start + PREDICT_BATCH)
            for pack, logits in zip(
                packs[rows], self.logits(packs[rows], images[rows]), strict=True
            ):
                kind, classes = kind_of(pack.metadata), pack.metadata.classes
                predictions += answers(kind, classes, pack.calibration, logits[None])
        return predictions

    @exact_float32()
    @torch.inference_mode()
    def logits(
        self, packs: Sequence[ResidentPack], images: Sequence[np.ndarray]
    ) -> list[torch.Tensor]:
        """The logits [C], on the CPU, of each image by its pack, as one batch."""
        distinct = {id(image): image for image in images}
        places = {key: place for place, key in enumerate(distinct)}
        sources = [places[id(image)] for image in images]
        batch = torch.from_numpy(np.stack(list(distinct.values()))).to(self.device)
        samples: dict[ResidentPack, list[int]] = defaultdict(list)
        for number, pack in enumerate(packs):
            samples[pack].append(number)
        found: dict[int, torch.Tensor] = {}
        with self._one_pass_at_a_time:
            mixed = [(pack, each) for pack, each in samples.items() if _is_flat(pack)]
            if mixed:
                numbers = [number for _, each in mixed for number in each]
                owners = [owner for owner, (_, each) in enumerate(mixed) for _ in each]
                forms = [pack.form for pack, _ in mixed]
                mine = [sources[number] for number in numbers]
                logits = self._network.logits(batch, forms, owners, mine)  # type: ignore[arg-type]
                found |= zip(numbers, logits, strict=True)
            for pack, each in samples.items():
                if not _is_flat(pack):
                    mine = [sources[number] for number in each]
                    found |= zip(each, pack.form(batch[torch.tensor(mine)]), strict=True)  # type: ignore[operator]
        return [found[number].cpu() for number in range(len(packs))]

    def _load(self, name: str) -> ResidentPack:
        return self.check(self._read(name))

    def check(self, content: bytes) -> ResidentPack:
        """The pack of a file's content, ready to predict, after checking its digest, its backbone
        and, once per file, the logits of its probe images. Raises PackError.
        """
        pack = read_pack(content)
        if kind_of(pack.metadata).is_dense:
            raise PackError(
                f"the pack of task {pack.metadata.task!r} is of kind {pack.metadata.kind!r}, which"
                " needs feature maps; load it alone: packs that share a pass read pooled features"
            )
        unpacked, digest = decode(pack, self.backbone), content_digest(content)
        if not self._network.can_mix(unpacked.recipe):
            model = from_pack(pack, self.backbone).to(self.device)
            tensors = [*model.values.parameters(), *model.buffers()]
            size_bytes = sum(each.nbytes for each in tensors)
            return ResidentPack(pack.metadata, digest, model, size_bytes, pack.calibration)
        flat = flatten(unpacked, self.device)
        resident = ResidentPack(pack.metadata, digest, flat, flat.size_bytes, pack.calibration)
        if digest not in self._probed:
            probe = list(self.backbone.takes.probe(PROBES))
            check_probe(torch.stack(self.logits([resident] * len(probe), probe)).numpy(), pack)
            self._probed.add(digest)
        return resident


def _is_flat(pack: ResidentPack) -> bool:
    return isinstance(pack.form, FlatPack)
